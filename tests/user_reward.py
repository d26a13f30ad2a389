"""A reward as a user writes one, in a file of its own: even a random model earns some of it, so that training moves."""


def even_share(completion_ids, odd=False, **_):
    """The share of even token ids in a completion; odd: of odd ones."""
    return [sum(token % 2 == odd for token in ids) / len(ids) for ids in completion_ids]
