"""Augmentation: a question in other words each time it is drawn.

    python mlx_grpo.py --config configs/demo.toml --set 'augment=["examples/augment.py:rephrased"]'
"""

OPENINGS = ["{}", "Work this out: {}", "{} Explain each step.", "Here is a problem. {}"]


def rephrased(row, rng):
    """row: the columns of one row, a dictionary of your own to change; rng: random.Random, seeded by run, row and epoch.
    Returns the row; the gold answer must stay what it is."""
    return row | {"question": rng.choice(OPENINGS).format(row["question"])}
