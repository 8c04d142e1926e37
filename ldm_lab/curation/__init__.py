"""Curation: from metadata and images to the data set that a model trains on.

`metadata/` selects and counts rows of LAION's tables and of img2dataset's; the rules themselves are `ldm_lab.rules`,
which training uses, too. `store.py` and the files beside it keep scores by hash. Neither imports torch: they are to
run in little memory.
"""
