"""Blends in the playground's engine: each writes as its own weights do, beside its base and its whole."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from app.errors import BadField
from app.models import interpolation
from app.spec import Adapter
from app.strategies import STRATEGIES
from tests.worker.inference.test_engine import PROMPTS, crowd, engine, home, ref_of, request  # noqa: F401
from worker.modeling.loading import load_model


def tuned_ref(home, tiny_model, name):  # noqa: F811
    """The small model changed at random by a strategy, as its job would have left it."""
    strategy = STRATEGIES[name]()
    torch.manual_seed(3)
    model = strategy.attach(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * (0.05 if name == "full" else 0.2))
    folder = home / "models" / name
    folder.mkdir()
    strategy.save(model, folder)
    (folder / "strategy.json").write_text(strategy.model_dump_json())
    if not type(strategy).adapter:
        return ref_of(home, path=f"models/{name}", revision="r1")
    return ref_of(home, adapters=[Adapter(strategy=name, path=f"models/{name}", sha256="a" * 64)])


def first_logprobs(engine, ref, prompt):  # noqa: F811
    """Of the five likeliest first tokens, as the engine says them."""
    asked = request(ref, prompt, logprobs=True, top_logprobs=5, max_tokens=1)
    parts = [entry for entries in engine.answer(asked) for entry in entries if entry.type == "text"]
    return [one.logprob for one in parts[0].logprobs[0].top]


def by_weights(ref, folder, prompt):
    """The same from the weights alone, read in one piece."""
    ids = AutoTokenizer.from_pretrained(folder)(prompt, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        return load_model(ref)(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1).topk(5).values.tolist()


@pytest.mark.parametrize("name", ["lora", "dora", "bottleneck_adapter", "layer_norm", "full"])
def test_a_blend_answers_as_its_own_weights_do(engine, home, tiny_model, name):  # noqa: F811
    base, tuned = ref_of(home), tuned_ref(home, tiny_model, name)
    half, none = (interpolation.blended(tuned, base, name, share) for share in (0.5, 0.0))
    assert (half.name, none.name) == ("tiny@0.5", "tiny@0") and interpolation.blended(tuned, base, name, 1.0) is tuned
    prompt = PROMPTS[0]
    if name == "full":  # its tokenizer lies beside its weights, as after a job
        AutoTokenizer.from_pretrained(tiny_model).save_pretrained(home / "models" / "full")
    refs = (base, half, tuned, none)
    crowd(engine, [request(ref, prompt) for ref in refs])  # all at once: loaded side by side, answered in one batch where they can be
    said = [first_logprobs(engine, ref, prompt) for ref in refs]
    assert said[0] == pytest.approx(said[3], abs=1e-4) and said[0] == pytest.approx(by_weights(base, tiny_model, prompt), abs=1e-4)
    assert said[1] == pytest.approx(by_weights(half, tiny_model, prompt), abs=1e-4)
    assert said[2] == pytest.approx(by_weights(tuned, tiny_model, prompt), abs=1e-4)
    for one, other in ((0, 1), (1, 2), (0, 2)):
        assert max(abs(a - b) for a, b in zip(said[one], said[other], strict=True)) > 0.005, "the blend changes nothing"
    if name == "lora":
        assert engine.shelf.loads == 1, "plain LoRA stands beside itself at another strength, on one base"


def test_names_of_blends():
    assert interpolation.split_name("ft:tiny:luthier::0123@0.5") == ("ft:tiny:luthier::0123", 0.5)
    assert interpolation.split_name("tiny") == ("tiny", None) and interpolation.split_name("a@b") == ("a@b", None)
    assert interpolation.split_name("tiny@.25")[1] == 0.25 and interpolation.split_name("tiny@1")[1] == 1
    with pytest.raises(BadField, match="between 0"):
        interpolation.split_name("tiny@2")


@pytest.mark.parametrize(
    ("scores", "forgetting", "best", "says"),
    [
        (
            [2.0, 1.6, 1.3, 1.1, 1.0],
            [0, 0.01, 0.02, 0.04, 0.20],
            0.75,
            "At 0.75 it keeps 90% of the gain, and general ability changes by −4.0% instead of −20.0%",
        ),
        ([2.0, 1.5, 1.2, 1.3, 1.6], [0, 0.0, 0.0, 0.0, 0.0], 0.5, "went too far"),
        ([2.0, 1.6, 1.3, 1.1, 1.0], [0, 0.0, 0.001, 0.001, 0.002], 1.0, "hardly keep more general ability"),
        ([2.0, 1.9, 1.7, 1.4, 1.0], [0, 0.01, 0.02, 0.04, 0.20], 1.0, "If general ability matters more: at 0.75 it keeps 60% of the gain"),
        ([1.0, 1.1, 1.2, 1.3, 1.4], [0, 0.1, 0.2, 0.3, 0.4], 0.0, "gained nothing"),
        ([2.0, 1.6, 1.3, 1.1, 1.0], [None] * 5, 1.0, "lowest at 1"),
    ],
)
def test_what_a_curve_advises(scores, forgetting, best, says):
    points = [
        {"blend": b, "score": s, "forgetting": f, "scores": {}} for b, s, f in zip(interpolation.POINTS, scores, forgetting, strict=True)
    ]
    assert interpolation.advise(points)[0] == best and says in interpolation.advise(points)[1]
    curve = interpolation.curve({"points": points})
    assert len(curve.score.marks) == 5 and (curve.ability is None) == (forgetting[0] is None)
    assert curve.score.marks[0].y != curve.score.marks[-1].y and interpolation.curve({}) is None
