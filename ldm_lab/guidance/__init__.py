"""Guidance: classifier-free guidance, and wrappers `predict -> predict` around it, one a file.

`classifier_free`   weighted prompts, interval, rescale, autoguidance: makes the innermost `predict`; its variants
                    replace the function that combines the predictions of the conditions (`Combine`)
`base`              what the wrappers around it are; each states its place
`thresholding`      10: static (clip_denoised) and dynamic thresholding
`clip`              20: CLIP guidance, a gradient in the predictions
`condition_score`   30: that gradient in x0 and eps, for samplers that do not follow it themselves
`inpaint`           40: the known part of an image
`stack`             puts them together in their order
`noised_clip`       the network that CLIP guidance asks
"""
