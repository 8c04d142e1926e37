"""Conditioners: what the denoiser is told about the image it is to make. Frozen; "cloob" is trained by its own task.

A conditioner is an `nn.Module` with

    embed_dim                                                      D, the width of an embedding; of token ids, how many
                                                                   different ones there are
    gives                                                          names in cond; ("embed",) where it is left out
    from_batch(batch) -> cond                                      in training: of the batch's images (or its texts)
    from_prompts(texts: list[str], images: list[Image]) -> cond    in sampling: one row per prompt, texts first
    null(cond) -> cond                                             as many rows that mean "no condition"

`cond` is a dict of tensors whose first axis is the batch, handed to the denoiser as keyword arguments:
{"embed": [B, D]}, or of `glide_text` {"tokens": int64 [B, L], "mask": bool [B, L]}, ids that the denoiser reads itself.
`batch.image` is [B, 3, H, W] in [-1, 1]; PIL images may have any mode and size. CLOOB, and what is to replace it
where texts and images are compared, also has

    encode_text(texts: list[str]) -> [n, D]                        unit rows
    encode_image(images [B,3,H,W] in [-1, 1]) -> [B, D]            unit rows
    tokenize(texts: list[str]) -> int64 [n, text_size]

All constructor arguments are keyword-only: the keys of the config section. A new conditioner is one file in this folder
with one `@register("conditioner", "name")`; `clip_tokens.py` holds CLIP's tokenizer, for any of them, and
`noised_clip.py` the CLIP by which sampling may be guided.
"""
