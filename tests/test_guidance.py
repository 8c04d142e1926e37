"""Guidance by weighted prompts, with a linear stand-in for the denoiser, and the stack of wrappers around it."""

import pytest
import torch

from ldm_lab.denoisers.glide_unet import GlideUNet
from ldm_lab.denoisers.if_unet import IFUNet
from ldm_lab.denoisers.imagen_unet import ImagenUNet
from ldm_lab.errors import UserError
from ldm_lab.guidance.base import Wrapper
from ldm_lab.guidance.classifier_free import guided, null_condition_weight, weighted_sum
from ldm_lab.guidance.clip import ClipGradient
from ldm_lab.guidance.condition_score import ConditionScore
from ldm_lab.guidance.inpaint import Inpaint
from ldm_lab.guidance.stack import stack
from ldm_lab.guidance.thresholding import DynamicThresholding, StaticThresholding, quantile
from ldm_lab.interfaces import Prediction
from ldm_lab.sampling import SamplingOptions
from ldm_lab.schedules import Cosine

B, K, D = 3, 2, 5


class Stand:
    """A denoiser whose prediction tells x, t and condition apart; remembers how many rows it was asked for."""

    def __init__(self, learned_variance=False):
        self.rows, self.learned_variance = [], learned_variance

    def __call__(self, x, t, cond):
        self.rows.append(len(x))
        assert len(t) == len(cond["embed"]) == len(x)
        level = (cond["embed"].sum(1) + 10 * t)[:, None, None, None]  # [M, 1, 1, 1]
        fraction = level.expand_as(x) if self.learned_variance else None
        return Prediction(x * level, x + level, fraction)


def close(a, b):
    """torch.testing.assert_close would do, but imports for half a minute on a busy machine."""
    return torch.allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(B, 4, 2, 2, generator=generator)
    t = torch.tensor([0.9, 0.5, 0.1])
    cond = {"embed": torch.randn(B, K, D, generator=generator)}
    return x, t, cond, {"embed": torch.zeros(B, D)}


def test_one_prompt_is_null_plus_weight_times_the_difference(inputs):
    x, t, cond, null = inputs
    one = {"embed": cond["embed"][:, :1]}
    stand = Stand()
    out = guided(stand, one, null, torch.full((B, 1), 3.0))(x, t)
    unconditioned, conditioned = Stand()(x, t, null), Stand()(x, t, {"embed": cond["embed"][:, 0]})
    assert stand.rows == [2 * B]
    for got, u, c in zip(out[:2], unconditioned[:2], conditioned[:2], strict=True):
        assert close(got, u + 3 * (c - u))


def test_several_prompts_are_mixed_with_each_image_s_own_weights(inputs):
    x, t, cond, null = inputs
    weights = torch.tensor([[1.5, -0.75], [0.25, 3.0], [2.0, 2.0]])
    stand = Stand()
    out = guided(stand, cond, null, weights)(x, t)
    terms = [Stand()(x, t, null), *(Stand()(x, t, {"embed": cond["embed"][:, k]}) for k in range(K))]
    full = torch.cat([1 - weights.sum(1, keepdim=True), weights], dim=1)[:, :, None, None, None]  # [B, 1 + K, 1, 1, 1]
    assert stand.rows == [(1 + K) * B]
    assert close(out.x0, sum(full[:, i] * term.x0 for i, term in enumerate(terms)))
    assert close(out.eps, sum(full[:, i] * term.eps for i, term in enumerate(terms)))


def test_the_mix_is_linear_in_the_weights(inputs):
    x, t, cond, null = inputs
    a, b = torch.tensor([[1.0, 2.0]]).expand(B, K), torch.tensor([[-3.0, 0.5]]).expand(B, K)
    outs = [guided(Stand(), cond, null, w)(x, t).x0 for w in (a, b, 0.25 * a + 0.75 * b)]
    assert close(outs[2], 0.25 * outs[0] + 0.75 * outs[1])


def test_a_condition_without_weight_is_not_evaluated(inputs):
    x, t, cond, null = inputs
    stand = Stand()
    # 1 + 1 evaluations, 1 (plain: no null condition), 1 (weight 0: nothing but the null condition)
    out = guided(stand, cond, null, torch.tensor([[3.0, 0.0], [0.0, 1.0], [0.0, 0.0]]))(x, t)
    assert stand.rows == [4]
    assert close(out.x0[1], Stand()(x, t, {"embed": cond["embed"][:, 1]}).x0[1])
    assert close(out.x0[2], Stand()(x, t, null).x0[2])


def test_rounding_does_not_cost_an_evaluation():
    weights = torch.full((2, 10), 0.1)
    weights[1, 0] = 0.2
    assert null_condition_weight(weights).tolist() == [0.0, pytest.approx(-0.1, abs=1e-6)]


def test_no_prompt_at_all_is_unconditional(inputs):
    x, t, cond, null = inputs
    out = guided(Stand(), {"embed": cond["embed"][:, :0]}, null, torch.zeros(B, 0))(x, t)
    assert close(out.eps, Stand()(x, t, null).eps)


def test_an_image_does_not_depend_on_the_others_in_its_batch(inputs):
    x, t, cond, null = inputs
    weights = torch.tensor([[1.5, -0.5], [0.25, 0.75], [2.0, 0.0]])
    together = guided(Stand(), cond, null, weights)(x, t)
    for i in range(B):
        row = slice(i, i + 1)
        alone = guided(Stand(), {"embed": cond["embed"][row]}, {"embed": null["embed"][row]}, weights[row])(
            x[row], t[row]
        )
        assert torch.equal(alone.x0, together.x0[row])
        assert torch.equal(alone.eps, together.eps[row])


def test_a_learned_variance_is_that_of_the_first_prompt_with_a_weight(inputs):
    x, t, cond, null = inputs
    weights = torch.tensor([[3.0, 1.0], [0.0, 2.0], [0.0, 0.0]])
    out = guided(Stand(learned_variance=True), cond, null, weights)(x, t)
    level = [cond["embed"][0, 0].sum(), cond["embed"][1, 1].sum(), torch.tensor(0.0)]
    for i in range(B):
        assert close(out.variance_fraction[i], (level[i] + 10 * t[i]).expand(4, 2, 2))


def test_outside_its_interval_there_is_no_guidance(inputs):
    x, _, cond, null = inputs
    weights = torch.tensor([[3.0, -1.0], [1.0, 3.0], [0.0, 0.0]])
    plain = [[1.0, 0.0], [0.25, 0.75], [0.0, 0.0]]
    for level, inside in ((0.1, False), (0.2, True), (0.7, True), (0.9, False)):
        t, stand = torch.full((B,), level), Stand()
        out = guided(stand, cond, null, weights, interval=(0.15, 0.8))(x, t)
        expected = guided(Stand(), cond, null, weights if inside else torch.tensor(plain))(x, t)
        assert close(out.x0, expected.x0) and close(out.eps, expected.eps)
        # 1 + 2 + 1 conditions are left outside; inside 1 + 2, 1 + 2, and 1.
        assert stand.rows == [7 if inside else 4]


def test_rescaling_brings_back_the_spread_of_v(inputs):
    x, _, cond, null = inputs
    t, schedule = torch.full((B,), 0.4), Cosine()
    weights = torch.full((B, 1), 5.0)
    one = {"embed": cond["embed"][:, :1]}
    alpha, sigma = schedule.alpha_sigma(t[0])

    def v(prediction):
        return (alpha * prediction.eps - sigma * prediction.x0).flatten(1)

    def consistent(x, t, cond):  # x = alpha * x0 + sigma * eps, as every objective has it
        wanted = x * cond["embed"].sum(1)[:, None, None, None] + x.flip(-1)
        return Prediction(alpha * x - sigma * wanted, sigma * x + alpha * wanted)

    plain = guided(consistent, one, null, torch.ones(B, 1))(x, t)
    full = guided(consistent, one, null, weights)(x, t)
    for share in (0.0, 0.3, 1.0):
        out = guided(consistent, one, null, weights, rescale=share, schedule=schedule)(x, t)
        factor = share * v(plain).std(1) / v(full).std(1) + 1 - share  # [B]
        assert close(v(out), v(full) * factor[:, None])
        assert close(alpha * out.x0 + sigma * out.eps, x)


def test_autoguidance_puts_the_worse_model_in_place_of_the_null_condition(inputs):
    x, t, cond, null = inputs

    def worse(x, t, cond):
        good = Stand()(x, t, cond)
        return Prediction(good.x0 * 0.5 + 1, good.eps * 0.5 - 1)

    weights = torch.tensor([[3.0, 0.0], [1.0, 1.0], [1.0, 0.0]])
    out = guided(Stand(), cond, null, weights, guide_model=worse)(x, t)
    toward = [Stand()(x, t, {"embed": cond["embed"][:, k]}) for k in range(K)]
    away = [worse(x, t, {"embed": cond["embed"][:, k]}) for k in range(K)]
    assert close(out.x0[0], 3 * toward[0].x0[0] - 2 * away[0].x0[0])
    assert close(out.eps[1], (toward[0].eps + toward[1].eps - (away[0].eps + away[1].eps) / 2)[1])
    assert close(out.x0[2], toward[0].x0[2])  # weight 1: no guidance


class Named(Wrapper):
    """Writes its name down when it is asked, then asks the one inside."""

    def __init__(self, name, order, log, adds_gradient=False):
        self.name, self.order, self.log, self.adds_gradient = name, order, log, adds_gradient

    def wrap(self, predict, schedule):
        def named(x, t):
            self.log.append(self.name)
            return predict(x, t)

        return named


def plain(x, t):
    return Prediction(x, 2 * x)


def test_every_wrapper_has_its_place_in_the_stack_however_they_are_given():
    orders = [wrapper.order for wrapper in (StaticThresholding, ClipGradient, ConditionScore, Inpaint)]
    assert orders == sorted(set(orders))
    x, t = torch.ones(1, 1, 2, 2), torch.tensor([0.5])
    for names in ("abc", "cab", "bca"):
        log = []
        wrappers = [Named(name, {"a": 1, "b": 25, "c": 99}[name], log) for name in names]
        stack(plain, wrappers, schedule=Cosine(), uses_gradient=False)(x, t)
        assert log == ["c", "b", "a"]  # the outermost is asked first


def test_a_gradient_is_worked_in_for_samplers_that_do_not_follow_it(inputs):
    x, schedule = inputs[0], Cosine()
    t = torch.full((B,), 0.5)
    alpha, sigma = schedule.alpha_sigma(t[0])

    class Push(Wrapper):
        order, adds_gradient = 20, True

        def wrap(self, predict, schedule):
            return lambda x, t: predict(x, t)._replace(gradient=torch.ones_like(x))

    followed = stack(plain, [Push()], schedule=schedule, uses_gradient=True)(x, t)
    assert torch.equal(followed.gradient, torch.ones_like(x)) and torch.equal(followed.x0, x)
    worked_in = stack(plain, [Push()], schedule=schedule, uses_gradient=False)(x, t)
    assert worked_in.gradient is None
    assert close(worked_in.eps, 2 * x - sigma) and close(worked_in.x0, x + sigma**2 / alpha)
    clipped = stack(plain, [Push(), StaticThresholding(0.5)], schedule=schedule, uses_gradient=False)(x, t)
    assert clipped.x0.abs().max() <= 0.5
    assert close(clipped.x0, (x.clamp(-0.5, 0.5) + sigma**2 / alpha).clamp(-0.5, 0.5))
    assert close(alpha * clipped.x0 + sigma * clipped.eps, x)
    given = stack(plain, [Push(), ConditionScore()], schedule=schedule, uses_gradient=False)(x, t)
    assert torch.equal(given.x0, worked_in.x0) and torch.equal(given.eps, worked_in.eps)
    own = stack(plain, [Push(), ConditionScore(StaticThresholding(0.25))], schedule=schedule, uses_gradient=False)(x, t)
    assert own.x0.abs().max() <= 0.25  # the one that was given, and no second one


def test_a_variant_combines_the_predictions_of_all_conditions_in_its_own_way(inputs):
    x, t, cond, null = inputs

    def guided_x0_unguided_eps(predictions, weights):  # CFG++
        return weighted_sum(predictions, weights)._replace(eps=predictions.eps[0])

    for weight in (1.0, 3.0):
        one, weights = {"embed": cond["embed"][:, :1]}, torch.full((B, 1), weight)
        given = guided(Stand(), one, null, weights)(x, t)
        out = guided(Stand(), one, null, weights, combine=guided_x0_unguided_eps)(x, t)
        unguided = guided(Stand(), one, null, torch.zeros(B, 1), interval=(0.0, 1.0))(x, t)
        assert torch.equal(out.x0, given.x0) and torch.equal(out.eps, unguided.eps)
    with pytest.raises(ValueError, match="a guide model needs weighted_sum"):
        guided(Stand(), one, null, weights, combine=guided_x0_unguided_eps, guide_model=Stand())


def test_rescale_needs_the_schedule(inputs):
    _, _, cond, null = inputs
    with pytest.raises(ValueError, match="rescale needs the schedule"):
        guided(Stand(), cond, null, torch.ones(B, K), rescale=0.5)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.73, 0.995, 1.0])
def test_the_quantile_is_torchs(share):
    rows = torch.randn(3, 101, generator=torch.Generator().manual_seed(0)).abs()
    assert torch.allclose(quantile(rows, share), torch.quantile(rows, share, dim=1), atol=1e-6)
    assert quantile(torch.tensor([[2.0]]), share) == 2


def test_dynamic_thresholding_keeps_shades_and_every_image_by_itself():
    ramp = torch.linspace(-4, 4, 257).expand(1, 1, 1, 257)
    x0 = torch.cat([ramp, ramp / 8])
    bounded = DynamicThresholding(percentile=0.995).bounded(x0)
    assert bounded.abs().max() <= 1 and torch.equal(bounded[1], x0[1])  # within the range: nothing to do
    assert torch.unique(bounded[0]).numel() > 250 > torch.unique(StaticThresholding().bounded(x0[:1])).numel()
    assert torch.equal(bounded[:1], DynamicThresholding(percentile=0.995).bounded(x0[:1]))
    half = DynamicThresholding(0.5, 0.995).bounded(x0)
    assert half.abs().max() <= 0.5 and torch.allclose(half[0], bounded[0] / 2, atol=1e-6)


@pytest.mark.parametrize("given", ["neither", "dynamic", "static", "percentile"])
def test_the_network_says_how_its_estimates_are_kept_in_range(given):
    chosen = {"dynamic": {"thresholding": "dynamic"}, "static": {"thresholding": "static"}}
    chosen["percentile"] = {"threshold_percentile": 0.9}
    options = SamplingOptions(**chosen.get(given, {}))
    imagen, others = (options.resolved(defaults=kind.sampling_defaults) for kind in (ImagenUNet, GlideUNet))
    kept = [(resolved.thresholding, resolved.threshold_percentile) for resolved in (imagen, others)]
    wanted = {
        "neither": [("dynamic", 0.995), ("static", None)],
        "dynamic": [("dynamic", 0.995)] * 2,
        "static": [("static", None)] * 2,
        "percentile": [("dynamic", 0.9)] * 2,
    }
    assert kept == wanted[given]
    assert imagen.clip_denoised is (None if given == "neither" else True)
    assert (imagen.guidance, others.guidance, imagen.resolved(upsampler=True).temperature) == (5, 3, 1)


def test_the_divisor_of_a_threshold_is_the_network_s_unless_it_is_given():
    base, upsampler = (
        SamplingOptions().resolved(upsampler=upsampler, defaults=IFUNet.sampling_defaults)
        for upsampler in (False, True)
    )
    assert (base.threshold_divisor, upsampler.threshold_divisor) == (1.5, 1.0)
    assert SamplingOptions().resolved(defaults=ImagenUNet.sampling_defaults).threshold_divisor is None
    given = SamplingOptions(threshold_divisor=2.0).resolved(defaults=GlideUNet.sampling_defaults)
    assert (given.thresholding, given.threshold_divisor, given.clip_denoised) == ("dynamic", 2.0, True)
    x0 = torch.linspace(-4, 4, 9).expand(1, 1, 1, 9)
    assert torch.equal(DynamicThresholding(1, 0.995, 1.0).bounded(x0), StaticThresholding().bounded(x0))
    assert torch.equal(DynamicThresholding(1, 0.995, 2.0).bounded(x0), (x0 / 2).clamp(-1, 1))


def test_nothing_is_thresholded_where_nothing_is_clipped():
    resolved = SamplingOptions(clip_denoised=False).resolved(defaults=ImagenUNet.sampling_defaults)
    assert (resolved.clip_denoised, resolved.thresholding, resolved.threshold_percentile) == (False, None, None)


def test_thresholding_that_cannot_be():
    for wrong in (1.5, -0.1, float("nan")):
        with pytest.raises(UserError, match=r"threshold_percentile: .*from 0 to 1.* is needed"):
            SamplingOptions(threshold_percentile=wrong)
    with pytest.raises(UserError, match="threshold_percentile: belongs to dynamic thresholding"):
        SamplingOptions(thresholding="static", threshold_percentile=0.9)
    for wrong in (0.5, float("inf"), float("nan")):
        with pytest.raises(UserError, match="threshold_divisor: "):
            SamplingOptions(threshold_divisor=wrong)
    with pytest.raises(UserError, match="threshold_divisor: belongs to dynamic thresholding"):
        SamplingOptions(thresholding="static", threshold_divisor=1.5)
    for given in ({"thresholding": "dynamic"}, {"thresholding": "static"}, {"threshold_divisor": 2.0}):
        with pytest.raises(UserError, match="clip_denoised: off leaves nothing to threshold"):
            SamplingOptions(**given, clip_denoised=False)
    with pytest.raises(UserError, match="thresholding: "):
        SamplingOptions(thresholding="soft")
