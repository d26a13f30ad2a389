"""Text from a vision-language model: images and messages into the model's inputs, then tokens one by one.

    session = VisionSession(model, config, tokenizer, processor, Sampling(temperature=0))
    for piece in session.stream(messages, images):
        print(piece, end="")
"""

import contextlib
import io
import time
import warnings
from pathlib import Path

import mlx.core as mx

from mlx_grpo import UserError
from mlx_grpo.inference_engine import Stats, TextStream, context_length, fit_context


def open_image(name):
    """A PIL image in RGB, turned as its EXIF data says. Raises UserError for what isn't a readable image file."""
    from PIL import Image, ImageOps, UnidentifiedImageError
    path = Path(name).expanduser()
    if not path.is_file():
        hint = "; download it first" if "://" in str(name) else ""
        raise UserError(f"image {name}: no such file{hint}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                return ImageOps.exif_transpose(image).convert("RGB")
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UserError(f"image {name} has more than {Image.MAX_IMAGE_PIXELS} pixels; make it smaller") from error
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:     # SyntaxError: a broken PNG
        raise UserError(f"image {name} can't be read: {error}") from error


def user_message(text, image_names=()):
    """A chat message as the models' templates take it: the images, then the text."""
    parts = [{"type": "image", "image": str(name)} for name in image_names]
    return {"role": "user", "content": parts + [{"type": "text", "text": text}]}


def qwen_inputs(processor, messages, images):
    """The inputs of a Qwen-VL model: input_ids (1, L), pixel_values (patches, features), image_grid_thw (images, 3)."""
    import jinja2
    if not processor.chat_template:
        raise UserError("this model has no chat template (a base model, most likely), so its prompts can't hold "
                        "images; use an instruct model")
    try:
        text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except jinja2.TemplateError as error:
        raise UserError(f"the model's chat template refuses this conversation: {error}") from error
    if text.count(processor.image_token) != len(images):
        places = text.count(processor.image_token)
        raise UserError(f"the prompt has {places} places for images and there are {len(images)}: leave "
                        f"{processor.image_token!r} out of the text; the images' places are put in before it")
    try:
        inputs = processor(text=[text], images=images or None)
    except ValueError as error:         # an image too long and narrow
        raise UserError(f"the model's image processor refuses an image: {error}") from error
    return {key: mx.array(value) for key, value in inputs.items() if key != "mm_token_type_ids"}


def deepseek_inputs(processor, messages, images):
    """The inputs of DeepSeek-OCR, whose prompt is `<image>` and an instruction, without roles: input_ids (1, L),
    pixel_values [crops (C, 3, 640, 640), whole images (N, 3, 1024, 1024)], images_spatial_crop (N, 2) and the spans
    of each image's tokens."""
    if len(messages) > 1:
        raise UserError("DeepSeek-OCR answers one instruction about its images: it knows no --system and no --chat")
    prompt = messages[0]["content"][-1]["text"].strip()
    if processor.image_token in prompt:
        raise UserError(f"leave {processor.image_token!r} out of the prompt; the images' places are put in before it")
    if not images:
        return {"input_ids": mx.array([[0, *processor.encode(prompt, bos=False)]])}       # 0: the start token
    ids, spans, crops, whole, shapes = [0], [], [], [], []
    for image in images:
        with contextlib.redirect_stdout(io.StringIO()):
            one = processor.process_one(prompt=processor.image_token, images=[image], inference_mode=False)
        places = one["input_ids"][0].tolist()[1:]               # without the start token: the image's alone
        spans.append((len(ids), len(ids) + len(places)))
        ids += places + processor.encode("\n", bos=False)
        shapes.append(one["images_spatial_crop"])
        whole.append(one["images"][1])
        if shapes[-1].max().item() > 1:
            crops.append(one["images"][0])
    ids += processor.encode(prompt, bos=False)
    return {"input_ids": mx.array([ids]), "images_spatial_crop": mx.concatenate(shapes), "spans": spans,
            "pixel_values": [mx.concatenate(crops) if crops else mx.zeros((0, 3, 640, 640)), mx.concatenate(whole)]}


def make_inputs(family, processor, messages, images):
    """What the model takes, for chat messages with `images` (PIL) in the order of their places. Raises UserError."""
    return (deepseek_inputs if family == "deepseekocr" else qwen_inputs)(processor, messages, images)


class VisionSession:
    """A model that answers conversations. Every answer prefills its whole conversation, the images with it."""

    def __init__(self, model, config, tokenizer, processor, sampling):
        self.model, self.config, self.tokenizer, self.processor = model, config, tokenizer, processor
        self.sampling, self.context = sampling, context_length(model)
        self.sampled, self.stats = [], Stats()          # of the last answer, end token included

    def end_tokens(self):
        """Ids that end an answer: the config's and the tokenizer's."""
        own = self.config.get("eos_token_id")
        return set(self.tokenizer.eos_token_ids) | set([own] if isinstance(own, int) else own or [])

    def processors(self, prompt_ids):
        """Logits in float32 (bfloat16 log-probs make ties), then the repetition penalty over prompt and answer."""
        return [lambda tokens, logits: logits.astype(mx.float32), *self.sampling.processors(prompt_ids)]

    def stream(self, messages, images=()):
        """Yields the answer piece by piece; `sampled` and `stats` are true at the end."""
        from mlx_lm.generate import wired_limit
        from mlx_vlm.generate import generate_step
        start = time.perf_counter()
        inputs = make_inputs(self.config["model_type"], self.processor, messages, list(images))
        ids = inputs.pop("input_ids")
        prompt_ids = ids[0].tolist()
        allowed = fit_context(len(prompt_ids), self.sampling.max_tokens, self.context)
        self.sampled, self.stats = [], Stats(len(prompt_ids))
        text, ends = TextStream(self.tokenizer), self.end_tokens()
        inputs.pop("attention_mask", None)      # one row, no padding
        tokens = generate_step(ids, self.model, inputs.pop("pixel_values", None), None, max_tokens=allowed,
                               sampler=self.sampling.sampler(), logits_processors=self.processors(prompt_ids), **inputs)
        try:
            with wired_limit(self.model):
                for token, _ in tokens:
                    if not self.sampled:
                        self.stats.first_token_s = time.perf_counter() - start
                    self.sampled.append(token)
                    if token in ends:
                        break
                    if piece := text.add(token):
                        yield piece
        finally:
            tokens.close()
            self.stats.tokens = len(self.sampled)
            self.stats.generation_s = time.perf_counter() - start - self.stats.first_token_s
            self.stats.ended = "stop" if self.sampled and self.sampled[-1] in ends else "length"
        if piece := text.finish():
            yield piece
