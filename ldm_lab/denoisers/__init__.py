"""Denoisers: the networks that are trained.

A denoiser is an `nn.Module` with

    __init__(channels, embed_dim, *, ...)               positional: channels of a latent, width of an embedding;
                                                        keyword-only: its options, the keys of its config section
    forward(x [B,C,h,w], t [B], **cond) -> [B,C,h,w]    x noised to time t in [0, 1], where 1 is noise and 0 is data;
                                                        [B,2C,h,w] comes out with a learned variance;
                                                        cond is what the conditioner made, such as embed [B, embed_dim];
                                                        zeros mean no condition
    multiple_of                                         the number that h and w have to be multiples of

and, where they are not left out,

    takes                                               names in cond that it cannot do without; else ("embed",)
    super_res                                           true of an upsampler: cond has low_res [B, 3, h', w'], too
    freeze_groups() -> {name: [parameters]}             parts that training may leave as they are (`optim.freeze`)
    timesteps                                           of the schedule, where t is embedded as one of them

What the output means (v, eps, ...) is the objective's business: a denoiser knows no noise schedule, and no row of its
output depends on another row of its input. `forward` raises UserError for a latent size that its levels do not divide,
the constructor for options that contradict each other. A new denoiser is one file in this folder with one
`@register("denoiser", "name")`.
"""
