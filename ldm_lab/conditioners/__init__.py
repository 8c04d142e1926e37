"""Conditioners: what the denoiser is told about the image it is to make (`ldm_lab.interfaces.Conditioner`).

Frozen; "cloob" is trained by its own task. A conditioner's `spec` says which conditions it gives. One whose texts and
images share a space is an `EmbeddingConditioner`: images are scored with it, too. All constructor arguments are
keyword-only: the keys of the config section. A new conditioner is one file in this folder with one
`@register("conditioner", "name")`.

`clip`              any CLIP of open_clip; `open_clip_config` says what may be asked for, `clip_tokenizers` reads texts
`cloob`             CLOOB of crowsonkb/cloob-training
`t5`                states of a frozen language model's tokens; `t5_models` finds and loads those of transformers
`glide_text`        token ids for denoisers that read text themselves
`none`              zeros
`clip_preprocess`   what images have to look like for CLIP's towers
"""
