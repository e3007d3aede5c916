"""Instruction tuning of decoders, with the loss on the answer only."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from peft_lab.backbones.from_pretrained import load_checkpoint
from peft_lab.data.kind import Kind
from peft_lab.data.profile import ColumnProfile, DataProfile, Proposal
from peft_lab.data.prompt_template import Template, fields, fill, values_in
from peft_lab.data.row_checks import RowFault, check_inputs, numbered, source_rows, warn_of_cut
from peft_lab.data.row_maps import identity_of_tokenizer, map_rows
from peft_lab.data.task_schema import PROMPT_IDS
from peft_lab.data.text_inputs import length_limit, longer_rows, padding_tokenizer
from peft_lab.errors import TaskError
from peft_lab.metrics import load_metric
from peft_lab.metrics.baselines import Baseline
from peft_lab.metrics.predictions import Predictions
from peft_lab.registry import KindInfo
from peft_lab.utils.batch_progress import advance

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import EvalPrediction, PreTrainedModel

    from peft_lab.data.task_registry import Task

MAX_LENGTH = 512
MAX_NEW_TOKENS = 64
IGNORED = -100

#: Column of the numbers of tokens that prompt and answer have before they are cut.
_LENGTHS = "lengths"
_CUT_PROMPT = "are longer than the limit, and their prompt loses its beginning"
_CUT_ANSWER = "have an answer longer than the limit, which loses its end and the end token, and no prompt"

#: Metrics of what the model writes by itself: each row has a value of its own, and the metric is their mean.
WRITTEN = ("exact_match", "rouge_l", "coverage")

#: Usual names of the columns of prompt and answer; a third column may hold what the instruction is about.
_PAIRS = (
    *(("prompt", "completion"), ("prompt", "response"), ("instruction", "output"), ("instruction", "response")),
    *(("question", "answer"), ("input", "output"), ("source", "target")),
)
_ABOUT = ("input", "context")


KIND = KindInfo(
    name="causal_lm",
    title="prompt -> written answer",
    runtime="CausalLM",
    settings=("template", "max_length", "max_new_tokens"),
    metrics=("perplexity", "token_accuracy", "exact_match", "rouge_l", "coverage"),
    task_type="CAUSAL_LM",
    pipeline_tag="text-generation",
    source_head=True,
)


class CausalLM(Kind):
    """`template.prompt` -> `template.answer`; AutoModelForCausalLM.

    Perplexity and token accuracy are taken on the answers' tokens, end token included, with the true tokens before
    them. The other metrics let the model write (greedily): `exact_match` compares what `template.extract` finds,
    `rouge_l` the whole text with the row's answer, and `coverage` is the share of what `template.required` finds in
    the prompt that stands in the text.
    """

    info = KIND
    scores_tokens = True

    def propose(self, profile: DataProfile) -> Proposal | None:
        if profile.given:
            return None
        known = {
            column.name.lower(): column for column in profile.columns.values() if column.type in ("text", "number")
        }
        pair = next((pair for pair in _PAIRS if known.keys() >= set(pair)), None)
        if pair is None:
            return self._of_two_texts(list(known.values()))
        prompt, answer = (known[name] for name in pair)
        about = next((known[name] for name in _ABOUT if name in known and name not in pair), None)
        between = f"\n{{{about.name}}}" if about else ""
        template = {"prompt": f"{{{prompt.name}}}{between}\n", "answer": f"{{{answer.name}}}"}
        # a question with an answer, or a source with a target, may be meant for another kind
        confidence = 0.9 if pair[0] in ("prompt", "instruction") else 0.3 if answer.holds_classes else 0.6
        return Proposal(self.name, confidence, settings={"template": template}, metrics=KIND.metrics[:2])

    def _of_two_texts(self, columns: Sequence[ColumnProfile]) -> Proposal | None:
        """Proposal for two columns of texts whose names say nothing."""
        if len(columns) != 2 or any(column.type != "text" or column.holds_few_classes for column in columns):
            return None
        first, second = columns
        template = {"prompt": f"{{{first.name}}}\n", "answer": f"{{{second.name}}}"}
        doubt = f'the prompt is "{first.name}", and "{second.name}" is what the model learns to write'
        return Proposal(self.name, 0.3, settings={"template": template}, metrics=KIND.metrics[:2], doubts=(doubt,))

    def check(self, task: Task) -> None:
        if task.template is None:
            raise TaskError('the kind "causal_lm" needs a "template" with "prompt" and "answer".')
        unfit = [name for name in task.metrics if name not in KIND.metrics]
        if unfit:
            known = ", ".join(KIND.metrics)
            raise TaskError(f'metric "{unfit[0]}" does not fit this kind of task; fitting: {known}.')
        if task.metrics[0] in WRITTEN:
            first = task.metrics[0]
            raise TaskError(f'the first metric is taken after every epoch, so it cannot be "{first}"; put it last.')
        if task.max_new_tokens is not None and not _written(task):
            names = ", ".join(WRITTEN)
            raise TaskError(f'"max_new_tokens" has no effect without a metric of {names}; remove it or name one.')
        if bool(task.template.required) != ("coverage" in task.metrics):
            raise TaskError('the metric "coverage" and the key "required" of the template go together; give both.')

    def reads_texts(self, task: Task) -> bool:
        return True

    def auto_class(self, task: Task) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM

    def load_processor(self, model_name_or_path: str, task: Task, **hub_kwargs: Any) -> Any:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(model_name_or_path, trust_remote_code=False, **hub_kwargs)
        if tokenizer.eos_token is None:
            raise TaskError(f'The tokenizer of "{model_name_or_path}" has no end token, so no answer could ever end.')
        # the end token can pad, because padding is masked by position and not by its id
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        if _template(task).chat and not tokenizer.chat_template:
            raise TaskError(
                f'"{model_name_or_path}" has no chat template; set "chat: false" in the template of the task.'
            )
        return tokenizer

    def load_model(
        self, model_name_or_path: str, task: Task, labels: Sequence[str] | None, **hub_kwargs: Any
    ) -> PreTrainedModel:
        hub_kwargs.setdefault("dtype", KIND.default_dtype)
        return load_checkpoint(self.auto_class(task), model_name_or_path, **hub_kwargs)[0]

    def row_faults(self, dataset: Dataset, task: Task) -> list[RowFault]:
        template = _template(task)
        missing: list[int] = []
        parts = ("prompt", "answer", "reference") if template.reference else ("prompt", "answer")
        blank: dict[str, list[int]] = {part: [] for part in parts}
        for row, values in enumerate(dataset):
            try:
                for part, rows in blank.items():
                    found = values_in(getattr(template, part), values)
                    if None in found.values():
                        missing.append(row)
                    elif _is_blank(found):
                        rows.append(row)
            except TaskError as error:
                raise TaskError(f'Task "{task.name}", row {row + 1}: {error}') from error
        return [
            RowFault("have no value in a column of the template", list(dict.fromkeys(missing)), "empty"),
            *[RowFault(f"have an empty {part}", rows, "empty") for part, rows in blank.items()],
        ]

    def preprocess(self, dataset: Dataset, processor: Any, task: Task, model: Any) -> Dataset:
        """Data set of `input_ids`, `attention_mask` and `labels`.

        `labels` are -100 on the prompt, and the answer's tokens after it.
        """
        template, limit = _template(task), length_limit(task, MAX_LENGTH, processor, model)

        def encode(row: dict[str, Any]) -> dict[str, Any]:
            prompt, answer = template.render(row)
            if template.required:
                template.demands(prompt)  # a row without any is found before the training and not after it
            # tokenised apart, so that the answer's tokens do not depend on where the prompt ends
            start = prompt_ids(processor, prompt, template.chat)
            # the end token is learnt as well, else a written answer would never end
            end = [*processor(answer, add_special_tokens=False)["input_ids"], processor.eos_token_id]
            return {**answer_only(start, end, limit, processor.bos_token_id), _LENGTHS: [len(start), len(end)]}

        read = [name for name in dataset.column_names if name != PROMPT_IDS]
        reads = [identity_of_tokenizer(processor), template.model_dump(), limit]
        rows = map_rows(dataset, encode, reads, remove_columns=read, desc="Tokenising")
        lengths = rows[_LENGTHS][:]
        empty = [row for row, (start, _) in enumerate(lengths) if not start]
        if empty:
            numbers = numbered(source_rows(dataset, empty))
            raise TaskError(
                f'Task "{task.name}": {len(empty)} of {len(rows)} rows have a prompt without a token ({numbers}); '
                "write something in the template's prompt, or leave these rows out."
            )
        cut = {
            _CUT_PROMPT: [row for row, (start, end) in enumerate(lengths) if start + end > limit],
            _CUT_ANSWER: [row for row, (_, end) in enumerate(lengths) if end > limit],
        }
        warn_of_cut(task, dataset, cut, longer_rows(limit, processor, model))
        return rows.remove_columns(_LENGTHS)

    def packed_length(self, processor: Any, task: Task, model: Any) -> int:
        return length_limit(task, MAX_LENGTH, processor, model)

    def data_collator(self, processor: Any, task: Task, model: Any) -> Any:
        from transformers import DataCollatorForSeq2Seq

        return DataCollatorForSeq2Seq(padding_tokenizer(processor, model), label_pad_token_id=IGNORED)

    @staticmethod
    def preprocess_logits_for_metrics(logits: Any, labels: Any) -> tuple[Any, Any]:
        """Predicted tokens and the true tokens' log-probabilities, both (n, t - 1).

        `logits` have the shape (n, t, vocabulary).
        """
        import torch
        from torch.nn import functional

        # Trainer hands on a tuple where a model returns more than logits, such as hidden states
        logits = logits[0] if isinstance(logits, tuple) else logits
        # virtual tokens of a prompt method stand before the row's own
        logits, targets = logits[:, -labels.shape[1] : -1], labels[:, 1:]
        # row by row, for log-probabilities of a whole batch over the vocabulary are as big as the logits
        losses = [
            functional.cross_entropy(row.float(), target, reduction="none", ignore_index=IGNORED)
            for row, target in zip(logits, targets, strict=True)
        ]
        return logits.argmax(-1), -torch.stack(losses)

    def compute_metrics(
        self, task: Task, labels: Sequence[str] | None, rows: Dataset | None = None
    ) -> Callable[[EvalPrediction], dict[str, float]]:
        perplexity, accuracy = load_metric("perplexity"), load_metric("accuracy")
        if "rouge_l" in task.metrics:
            load_metric("rouge_l")  # a missing package is found before the training and not after it

        def compute(prediction: EvalPrediction) -> dict[str, float]:
            outputs: Any = prediction.predictions
            label_ids: Any = prediction.label_ids
            # the predictions are shifted by one token already, the labels are not
            (predicted, log_probabilities), targets = outputs, label_ids[:, 1:]
            kept = targets != IGNORED
            found: dict[str, float] = {}
            if "perplexity" in task.metrics:
                found |= perplexity.compute(predictions=log_probabilities[kept])
            if "token_accuracy" in task.metrics:
                hits = accuracy.compute(predictions=predicted[kept], references=targets[kept])
                found["token_accuracy"] = hits["accuracy"]
            return found

        return compute

    def row_predictions(self, prediction: EvalPrediction, task: Task, rows: Dataset | None = None) -> Predictions:
        outputs: Any = prediction.predictions
        label_ids: Any = prediction.label_ids
        (predicted, log_probabilities), targets = outputs, label_ids[:, 1:]
        # Trainer pads shorter batches with -100, in predictions as in labels
        kept = targets != IGNORED
        columns = {
            "loss": -(log_probabilities * kept).sum(-1),
            "tokens": kept.sum(-1),
            "hits": ((predicted == targets) & kept).sum(-1),
        }
        return Predictions(self.name, columns)

    def baseline(self, task: Task, labels: Sequence[str] | None, train: Dataset, rows: Dataset) -> Baseline:
        """Scores of a predictor that knows the frequencies of the training answers' tokens."""
        import numpy as np

        known, wanted = _answer_tokens(train), _answer_tokens(rows)
        # one more of each token, so that none of them is impossible
        counts = np.bincount(known, minlength=int(wanted.max()) + 1) + 1
        log_probabilities = np.log(counts / counts.sum())[wanted]
        found: dict[str, float] = {}
        if "perplexity" in task.metrics:
            found |= load_metric("perplexity").compute(predictions=log_probabilities)
        if "token_accuracy" in task.metrics:
            found["token_accuracy"] = float((wanted == counts.argmax()).mean())
        return Baseline("the frequencies of the training answers' tokens", found)

    def generation_scores(
        self, model: Any, processor: Any, dataset: Dataset, task: Task, batch_size: int = 16
    ) -> dict[str, list[float]]:
        wanted, template = _written(task), _template(task)
        if not wanted:
            return {}
        plain = list(dataset)
        prompts = [fill(template.prompt, row) for row in plain]
        # rows may share a prompt, and with it what is written
        keys = [(prompt, row.get(PROMPT_IDS)) for prompt, row in zip(prompts, plain, strict=True)]
        once = dict(zip(keys, plain, strict=True))
        ids = [number for _, number in once] if PROMPT_IDS in dataset.column_names else None
        answers = self.predict_with_prompts(model, processor, list(once.values()), task, batch_size, ids)
        texts = dict(zip(once, answers, strict=True))
        written = [texts[key] for key in keys]
        found: dict[str, list[float]] = {}
        if "exact_match" in wanted:
            pairs = [(template.found(text), template.target(row)) for text, row in zip(written, plain, strict=True)]
            found["exact_match"] = _of_each("exact_match", pairs)
        if "rouge_l" in wanted:
            pairs = [(text, template.render(row)[1]) for text, row in zip(written, plain, strict=True)]
            found["rouge_l"] = _of_each("rouge_l", pairs)
        if "coverage" in wanted:
            found["coverage"] = [template.coverage(*pair) for pair in zip(prompts, written, strict=True)]
        return found

    def predict(self, model: Any, processor: Any, inputs: Sequence[Any], task: Task, batch_size: int = 32) -> list[str]:
        """Texts that the model writes, greedily.

        Inputs are mappings of the template's columns, or texts if it has a single column.
        """
        import torch

        template = _template(task)
        new_tokens = task.max_new_tokens or MAX_NEW_TOKENS
        limit = max(1, length_limit(task, MAX_LENGTH, processor, model, reserve=new_tokens))
        rows = [_columns(template, value) for value in inputs]
        read = [values_in(template.prompt, row) for row in rows]
        blank = [row for row, found in enumerate(read) if None in found.values() or _is_blank(found)]
        check_inputs(task, [RowFault("have an empty prompt, or no value in one of its columns", blank, "empty")])
        whole = [prompt_ids(processor, fill(template.prompt, row), template.chat) for row in rows]
        empty = [row for row, ids in enumerate(whole) if not ids]
        check_inputs(task, [RowFault("have a prompt without a token", empty)])
        cut = {_CUT_PROMPT: [row for row, ids in enumerate(whole) if len(ids) > limit]}
        warn_of_cut(task, None, cut, longer_rows(limit, processor, model, reserve=new_tokens))
        prompts = [last_tokens(ids, limit, processor.bos_token_id) for ids in whole]
        written = [""] * len(prompts)
        training = model.training
        model.eval()
        try:
            for chosen in _batches([len(prompt) for prompt in prompts], batch_size, _skips_padding(model)):
                # padded on the left: the new tokens must follow the prompt's last one
                batch = processor.pad(
                    {"input_ids": [prompts[row] for row in chosen]}, padding_side="left", return_tensors="pt"
                ).to(model.device)
                with torch.no_grad():
                    tokens = model.generate(
                        **batch, max_new_tokens=new_tokens, do_sample=False, pad_token_id=processor.pad_token_id
                    )
                texts = processor.batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
                for row, text in zip(chosen, texts, strict=True):
                    written[row] = text.strip()
                advance(len(chosen))
        finally:
            model.train(training)
        return written

    def predict_with_prompts(
        self,
        model: Any,
        processor: Any,
        inputs: Sequence[Any],
        task: Task,
        batch_size: int,
        ids: Sequence[int] | None,
        **options: Any,
    ) -> list[Any]:
        # numbers of prompts are given batch by batch, in the order of the inputs, which `predict` may change
        size = batch_size if ids is None or _skips_padding(model) else 1
        return super().predict_with_prompts(model, processor, inputs, task, size, ids, **options)


def prompt_ids(tokenizer: Any, prompt: str, chat: bool) -> list[int]:
    """Token ids of a prompt, with a beginning and without an end."""
    if chat:
        turn = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        # a chat template writes the special tokens itself, and the tokenizer would add them again
        return tokenizer(prompt, add_special_tokens=False)["input_ids"]
    ids = tokenizer(prompt)["input_ids"]
    # some tokenizers add an end token, after which a decoder would not go on writing
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def answer_only(start: list[int], end: list[int], limit: int, bos: int | None) -> dict[str, list[int]]:
    """Join the tokens of prompt and answer.

    Tokens over `limit` are cut from the prompt's front, then from the answer's end.

    Returns:
        `input_ids`, `attention_mask` and `labels` of one length; `labels` equal `input_ids` on the answer, else -100.
    """
    # the answer has room first, because the loss is taken on it alone
    end = end[:limit]
    start = last_tokens(start, limit - len(end), bos)
    ids = start + end
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [IGNORED] * len(start) + end}


def _skips_padding(model: Any) -> bool:
    """Test whether a decoder can go on with a batch that is padded at the left.

    It must take positions, with which `generate` leaves the padding out of the count, and have no recurrence or
    convolution over the text, which would carry prompts of an adapter through the padding.
    """
    config = model.config.get_text_config()
    forward = (model.get_base_model() if hasattr(model, "get_base_model") else model).forward
    kinds = set(getattr(config, "layer_types", None) or ())
    attends = all(kind.endswith("_attention") and kind != "linear_attention" for kind in kinds)
    return attends and "position_ids" in inspect.signature(forward).parameters


def _batches(lengths: Sequence[int], size: int, mixed: bool) -> Iterator[list[int]]:
    """Row numbers in batches of at most `size`, each of rows of one length unless `mixed`."""
    groups: dict[int, list[int]] = {}
    for row, length in enumerate(lengths):
        groups.setdefault(0 if mixed else length, []).append(row)
    for rows in groups.values():
        for start in range(0, len(rows), size):
            yield rows[start : start + size]


def _answer_tokens(rows: Dataset) -> Any:
    """Tokens of all answers that have a token before them, (n,)."""
    import numpy as np

    tokens = np.concatenate([row[1:] for row in rows["labels"][:]])
    return tokens[tokens != IGNORED]


def last_tokens(ids: list[int], room: int, bos: int | None) -> list[int]:
    """The last `room` tokens of a prompt, in training as in prediction.

    A decoder that was trained with a first token needs it, so that one is kept however long the prompt is.
    """
    if len(ids) <= room:
        return ids
    keep_bos = room > 1 and ids[0] == bos
    return [ids[0], *ids[len(ids) - room + 1 :]] if keep_bos else ids[len(ids) - room :]


def _written(task: Task) -> list[str]:
    return [name for name in WRITTEN if name in task.metrics]


def _of_each(name: str, pairs: Sequence[tuple[str, str]]) -> list[float]:
    """Metric of ours on each pair of (written, wanted) text."""
    metric = load_metric(name)
    return [metric.compute(predictions=[found], references=[wanted])[name] for found, wanted in pairs]


def _template(task: Task) -> Template:
    if task.template is None:
        raise TaskError(f'Task "{task.name}" has no template.')
    return task.template


def _is_blank(values: Mapping[str, Any]) -> bool:
    """Test whether a text has nothing of a row's own in it."""
    return not any(str(value).strip() for value in values.values())


def _columns(template: Template, value: Any) -> Mapping[str, Any]:
    """Columns of an input of a prediction."""
    names = list(dict.fromkeys(fields(template.prompt)))
    if isinstance(value, str) and len(names) == 1:
        value = {names[0]: value}
    if not isinstance(value, Mapping):
        raise TaskError(f"an input of this task is a mapping with the keys {', '.join(names)}, not {value!r}.")
    return value
