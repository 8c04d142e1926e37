"""Models that travel: a folder to sample from offline, its model card, and pipelines of diffusers.

`parts`       the frozen parts of a model as files in the folder
`facts`       what is known of how a model came about
`card`        the model card (README.md)
`hub`         the folder
"""
