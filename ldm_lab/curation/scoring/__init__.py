"""Scores for images: every one is embedded once, then asked by every head.

`job`           what a pass over shards or image files makes of them (`ldm_lab.data.passes`)
`files`         what it writes beside a shard: a Parquet of scores, a file of embeddings
`rewrite`       copies of shards whose json has the scores
`rating_means`  the mean embedding of each range of scores
"""
