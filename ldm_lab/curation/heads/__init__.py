"""Heads: predictors of one number from an embedding, such as how beautiful an image is, or how likely a watermark.

A head is a part of role "head", a subclass of `head.Head`: `raw(embeds [N, D] of unit length) -> [N]`, and in its
constructor the keys of `Head`, by which every head knows whose embeddings it takes and what it predicts. Calling it
normalizes the embeddings, so a head cannot be fed wrongly scaled ones. A new kind is one file with one
`@register("head", "name")`; a linear one or an MLP for another purpose (NSFW, watermarks) is only another file of
weights.
"""
