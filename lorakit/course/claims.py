"""How a lesson holds its conclusions: true where it claims them, and elsewhere in words."""

import re
from typing import Any

from lorakit.experiments.verdicts import Finding


def expect(holds: Any, sentence: str, *, here: bool) -> None:
    """Asserts a conclusion that was drawn from measurements; what is true at any setting needs a plain `assert`.

    Args:
        holds: whether it is true of this run: a truth value, what `verdict.says(outcome)` or `finding` returns, or a
            list of these, which must all be true.
        sentence: the conclusion, without its full stop. It names each flag of the verdicts on which it rests: "tie",
            "edge", "untuned", "ceiling", "floor", "few seeds".
        here: whether the lesson claims it for these settings; if not, it prints whether the conclusion holds.

    Raises:
        AssertionError: it is claimed here and not true, or it rests on a flag that it does not name.
    """
    parts = holds if isinstance(holds, list) else [holds]
    findings = [part for part in parts if isinstance(part, Finding)]
    true = all(part.holds if isinstance(part, Finding) else part for part in parts)
    flags = {flag: why for each in findings for flag, why in each.flags.items()}
    unsaid = {flag: why for flag, why in flags.items() if not re.search(rf"\b{flag}[sd]?\b", sentence, re.IGNORECASE)}
    said = "; ".join([sentence, *(f"{flag}: {why}" for flag, why in unsaid.items())])
    if not here:
        print(f"{'holds' if true else 'does not hold'} with these settings: {said}")
    elif not true:
        raise AssertionError(f"expected with these settings: {sentence}")
    elif unsaid:
        raise AssertionError(f"expected a sentence that names its flags ({', '.join(unsaid)}), got: {said}")
