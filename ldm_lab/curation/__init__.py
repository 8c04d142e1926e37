"""Curation: from images and metadata to the data set that a model trains on.

`heads`     predictors on embeddings: what a file of one looks like, a part of role "head" for each kind, and training
`scoring`   shards in, Parquet with scores out, on any number of devices
`metadata`  selects and counts rows of LAION's tables and of img2dataset's; the rules are `ldm_lab.rules`, which
            training uses, too
`store`     scores by hash on disk, in LAION's format
`buckets`   of all histograms; `shard_histogram` is the one of images in shards; `sql` quotes

`metadata` and `store` import no torch: they are to run in little memory.
"""
