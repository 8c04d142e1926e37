"""Scores by hash, in the key-value files that LAION released beside its collections.

`format`      what a file of them is: read, looked up, written
`columns`     where tables have the keys
`build`       one of Parquet tables larger than memory
`lookup`      a column of scores for each row of a table
`statistics`  the histogram of all its scores
"""
