"""Study 3: at one total of trained numbers, whether it matters that ranks are adaptive and dealt to the right layers."""

from experiments.spec import Spec, seeds

TITLE = "Adaptive, fixed and shuffled ranks at one total"
QUESTION = "Is it the allocation of the ranks or their sum that counts?"
VALUES, FACTORS = (0.1, 0.3, 0.6), (0.02, 0.05)
KINDS = {"adaptive": "{}", "fixed": "uniform:like={}", "shuffled": "{}|shuffled"}


def plans(threshold: float) -> dict[str, str]:
    """The three plans of one total."""
    return {kind: form.format(f"threshold:{threshold:g}") for kind, form in KINDS.items()}


def specs(model: str) -> list[Spec]:
    """Three seeds of each; a shuffle follows the seed, so that three are tried."""
    if model == "tiny":
        return seeds([Spec("sara", plan, "sums", steps=12, batch=8, model=model) for plan in plans(0.3).values()], 2)
    values = [Spec("sara", plan, model=model) for t in VALUES for plan in plans(t).values()]
    factors = [Spec(method, plan, model=model) for method in ("sara-factors-svd",) for t in FACTORS for plan in plans(t).values()]
    return seeds([*values, *factors])
