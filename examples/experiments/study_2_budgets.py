"""Study 2: SARA against LoRA at equal trained numbers, and Mo-SARA against a LoRA ten and a hundred times as large."""

from experiments.spec import Spec, seeds

TITLE = "SARA and LoRA at equal budgets"
QUESTION = "Which learns more from the same number of trained parameters?"
# LoRA by what trains: rank 1 on some of the weights, or a rank on all of them; SARA's factors have one number more a rank.
LORA = {
    23_040: "r=1,on=v_proj",
    57_600: "r=1,on=q_proj+v_proj",
    305_280: "r=1",
    1_221_120: "r=4",
    2_442_240: "r=8",
    9_768_960: "r=32",
}
RANKS = {305_280: 1, 1_221_120: 4, 2_442_240: 8, 9_768_960: 32}
SITES = 210
CONTROLS = (("full", ""), ("pissa", "r=8"), ("adalora", "r=8"), ("ia3", ""), ("vera", "r=256"), ("untouched", ""))
TIMED = (
    ("full", ""), ("lora", "r=8"), ("pissa", "r=8"), ("adalora", "r=8"), ("ia3", ""), ("vera", "r=256"),
    ("sara", "threshold:0.1"),
    ("sara", "threshold:0.6"), ("sara-factors-svd", "threshold:0.01"), ("mosara-soft", "threshold:0.5"),
    ("mosara-topk2", "threshold:0.5"),
)  # fmt: skip


def sara(budget: int) -> dict[str, str]:
    """SARA's methods and plans for a budget: the singular values where it is below what they have, else the factors."""
    if budget not in RANKS:
        return {"sara": f"budget:{budget}"}
    plan = f"budget:{budget + SITES * RANKS[budget]}"
    return {"sara-factors-svd": plan, "sara-factors-random": plan}


ROUTED = {244_224: "budget:244224", 24_422: "budget:24422"}  # a tenth and a hundredth of LoRA's at rank 8


def specs(model: str) -> list[Spec]:
    """Three seeds of every budget, then the other methods, then their timings."""
    if model == "tiny":
        few = [
            ("sara", "budget:60"),
            ("lora", "r=1"),
            ("sara-factors-svd", "rank:2"),
            ("mosara-soft", "threshold:0.5"),
            ("full", ""),
        ]
        return seeds([Spec(method, plan, "sums", steps=12, batch=8, model=model) for method, plan in few], 2)
    pairs = [("lora", plan) for plan in LORA.values()]
    pairs += [pair for budget in LORA for pair in sara(budget).items()]
    pairs += [("mosara-soft", plan) for plan in ROUTED.values()]
    found = seeds([Spec(method, plan, model=model) for method, plan in [*pairs, *CONTROLS[:-1]]])
    timed = [Spec(method, plan, model=model, kind="timing", steps=20) for method, plan in TIMED]
    return [*found, Spec("untouched", model=model), *timed]
