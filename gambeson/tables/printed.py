"""CDP's Tables 2 to 6 as printed, percent, with the line of each number in the paper's text (shared/papers/001_*.txt).

Amounts are synthetic images for each of CIFAR-10's 50,000 real ones: 50K, 200K and 1M are 1, 4 and 20. In our text of
the paper Table 4's row of lambda 100k lacks two numbers; its others are those of Table 2, whose line then stands there.
"""

from __future__ import annotations

from gambeson.tables.cells import Printed

AMOUNTS = (1, 4, 20)
_LOST = "not legible in our text of Table 4; Table 2, line 191, prints the other one for this setting"

# row | line | clean and robust at each amount ("-": not legible)
_TABLES = {
    "cdp-2": """
none 191 81.09 49.54
plain 191 84.65 52.46 85.86 54.99 85.37 56.61
cdp 191 83.66 53.91 85.71 55.79 86.30 56.84
""",
    "cdp-3": """
none 196 78.41 46.03
plain 197 86.87 56.11
cdp 198 86.94 56.27
""",
    "cdp-4": """
lambda-50k 207 84.41 53.78 85.45 55.24 86.35 56.83
lambda-100k 207 - 53.91 85.71 - 86.30 56.84
lambda-200k 208 84.51 53.55 85.51 55.33 85.98 56.69
""",
    "cdp-5": """
infonce 215 83.40 52.74 84.18 54.75 85.64 56.28
hnm-embedding 215 84.20 53.19 85.71 54.92 85.29 56.12
hnm 215 83.97 52.89 85.65 54.83 85.38 55.95
""",
    "cdp-6": """
plain-separability 223 79.93 49.49 85.09 54.90 84.87 56.08
cdp-gradient-norm 224 83.92 55.09 84.64 55.17 86.36 57.11
cdp-gradient-norm-rob 225 83.91 55.23 84.78 55.42 85.93 57.18
cdp-entropy 226 84.17 55.08 85.71 55.79 86.30 56.84
""",
}


def printed(table: str) -> dict[tuple[str, int], Printed]:
    """(row, amount) -> what the paper prints; rows without synthetic images have amount 0. Empty for other tables."""
    found: dict[tuple[str, int], Printed] = {}
    for text in _TABLES.get(table, "").strip().splitlines():
        name, line, *numbers = text.split()
        values = [None if word == "-" else float(word) for word in numbers]
        amounts = (0,) if name == "none" else AMOUNTS
        for amount, clean, robust in zip(amounts, values[::2], values[1::2], strict=False):
            note = _LOST if None in (clean, robust) else ""
            found[name, amount] = Printed(clean=clean, robust=robust, line=int(line), note=note)
    return found
