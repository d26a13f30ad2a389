"""Chat messages as token ids or text, through the template that a model brings along."""

from mlx_grpo import UserError


def rendered(tokenizer, messages, tokenize=True, add_generation_prompt=True, **options):
    """Token ids of chat messages (a list of int), or their text. Raises UserError where the template refuses them, is
    broken, or leaves nothing of them."""
    options |= {} if tokenize else {"tokenize": False}
    try:
        found = tokenizer.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, **options)
    except UserError:
        raise
    except Exception as error:      # a template is the model's own code, and may fail in any way
        raise UserError(f"the model's chat template refuses this conversation: {error} ({type(error).__name__}): "
                        f"{str(messages)[:200]}; mend chat_template in the model's directory, or the messages") from error
    if not len(found):
        raise UserError(f"the model's chat template makes nothing of {str(messages)[:200]}; mend chat_template in "
                        "the model's directory")
    return [int(token) for token in found] if tokenize else found
