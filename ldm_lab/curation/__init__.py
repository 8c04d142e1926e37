"""From images and metadata to the subset that a model trains on.

`heads`     predictors on embeddings: what a file of one looks like, and a part of role "head" for each kind
`scoring`   shards in, Parquet with scores out, on any number of devices
"""
