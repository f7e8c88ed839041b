"""`RowSFTTrainer`: trl's SFTTrainer, for rows.

trl prepares data, makes a collator and replaces the model's forward in its constructor. Here it is given a stand-in for
the data, and its forward is taken away again; what remains is its loading of models and tokenizers, its adapters and
its arguments, around what `RowTraining` does.
"""

import copy
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import Trainer, TrainerCallback

from flexreason.data.collator import Collator
from flexreason.data.intake import EntryEncoder
from flexreason.data.sets import encode_set
from flexreason.model.find import find_root
from flexreason.model.hooks import find_patch
from flexreason.train.model import patch_chunked
from flexreason.train.trainer import ROWS, RowTraining

if TYPE_CHECKING:
    from trl import SFTConfig, SFTTrainer
else:
    try:
        from trl import SFTConfig, SFTTrainer
    except ImportError as error:
        reason = str(error)

        class SFTTrainer:
            """Stands for trl's, so that who only looks is shown something, and who trains is told what is missing."""

            def __new__(cls, *_: Any, **__: Any) -> Any:
                raise ImportError(
                    f"{cls.__name__}: it is trl's SFTTrainer with rows, and trl cannot be imported here ({reason}); "
                    "pip install 'flexreason[sft]'"
                )


CONTRADICTIONS = {
    "packing": "a batch becomes one row already; for full rows of one length give "
    "train_dataset=fr.Rows(layouts, length)",
    "eval_packing": "a batch becomes one row already",
    "padding_free": "a row has no padding between its conversations",
    "use_liger_kernel": "it replaces parts of the model when training starts, after patch has looked at them",
    "router_aux_loss_coef": "the auxiliary loss of a router would count the tokens of the tree, not of the samples",
    "label_smoothing_factor": "it would shift a row's targets, which are in their places",
}
"""Arguments that do not go with rows, and why."""


class RowSFTTrainer(RowTraining, SFTTrainer):
    """trl's SFTTrainer for rows: all turns of a conversation in one pass, with the gradients of one sample a turn.

    A *turn* is an assistant message. Its *sample* is what inference would see before it, and itself as target. The
    samples of a conversation are merged into a *tree* (`fr.Layout`), and the trees of a batch stand in one *row*.

    Write what you would write for SFTTrainer, and give it conversations as they are:

        import flexreason as fr
        from datasets import load_dataset
        from peft import LoraConfig
        from trl import SFTConfig

        data = load_dataset("json", data_files="chats.jsonl", split="train")  # {"messages": [...]} a line
        parts = data.train_test_split(0.05, seed=0)
        trainer = fr.RowSFTTrainer(
            model="Qwen/Qwen3-0.6B",
            args=SFTConfig(
                output_dir="runs/sft",  # without a GPU also use_cpu=True
                num_train_epochs=2,
                per_device_train_batch_size=4,  # so many conversations are one row, however long they are
                gradient_accumulation_steps=4,
                learning_rate=1e-4,
                eval_strategy="epoch",
                save_strategy="epoch",
                report_to="none",
            ),
            train_dataset=parts["train"],
            eval_dataset=parts["test"],
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        )
        trainer.train()  # after a crash: train(resume_from_checkpoint=True)
        trainer.save_model()

    The same with a model and a tokenizer that are made here:

    >>> import tempfile
    >>> import flexreason as fr
    >>> from flexreason.demo.material import config, make_tokenizer
    >>> from transformers import Qwen3ForCausalLM
    >>> from trl import SFTConfig
    >>> tokenizer = make_tokenizer()
    >>> answer = {"role": "assistant", "reasoning_content": "1+1=2", "content": "2"}
    >>> chats = [{"messages": [{"role": "user", "content": "1+1"}, answer] * 2}] * 4
    >>> folder = tempfile.TemporaryDirectory()
    >>> trainer = fr.RowSFTTrainer(
    ...     model=Qwen3ForCausalLM(config(tokenizer)),
    ...     args=SFTConfig(folder.name, max_steps=2, save_strategy="no", use_cpu=True, disable_tqdm=True),
    ...     train_dataset=chats,
    ...     processing_class=tokenizer,
    ... )
    >>> trainer.train().global_step  # doctest: +ELLIPSIS
    {'train_runtime': ...}
    2
    >>> folder.cleanup()

    **Model.** A name or a model, patched (`fr.patch`) or not: then it is patched here, with its loss in chunks, so that
    the logits of all targets are never held. `peft_config` for LoRA. For QLoRA, where bitsandbytes is installed,
    `quantization_config=BitsAndBytesConfig(load_in_4bit=True, ...)` beside a name, or a model that was loaded so.

    **Data.** Conversations in any form that `fr.EntryEncoder` takes (messages, ShareGPT, prompt and completion, each
    with `tools` and `chat_template_kwargs` beside it; other columns are left alone), or layouts: a `datasets` set, a
    stream, a list, an iterable, or `fr.Rows(layouts, length)`. `eval_dataset` takes the same, or names with such.
    Every assistant message is trained, with its reasoning (`reasoning_content`), in the history that the chat template
    shows it at inference; `"train": false` in a message makes it history only. An answer without reasoning is trained
    as the template has it, with an empty block where that writes one. `flexreason show` shows what is trained.
    Nothing is cut. A conversation that cannot be encoded exactly stops the constructor with all of them named, or is
    left out with `skip_invalid=True`; of a stream the first one stops training.

    **Length and memory.** A row is as long as its conversations: for less memory take fewer of them a row and more
    `gradient_accumulation_steps`. For full rows of one length, into which long conversations are split:

        layouts = [item.layout for item in Intake(data, fr.EntryEncoder(tokenizer))]  # of flexreason.data.intake
        parts = [part for layout in layouts for part in fr.split(layout, 8192).parts]
        rows = fr.Rows(parts, 8192, epochs=2, multiple=4)  # multiple: gradient_accumulation_steps x processes
        # train_dataset=rows, data_collator=fr.Collator(8192), num_train_epochs=1: rows holds all epochs

    `max_length` refuses conversations with longer samples, unless it is 1024: that is trl's default, which cannot be
    told from one that you give. Precision and checkpointing are those of SFTConfig.

    **A step** is the mean over all its targets, whatever rows, accumulation and processes they fall on.

    **Logs.** `loss_reasoning`, `loss_response` and tokens a second, of trees and of the samples they stand for.
    Evaluation is the mean over all targets: `eval_loss`, `eval_loss_reasoning`, `eval_loss_response`,
    `eval_loss_turn_0` to `_7` and `_8_on` (turns that are trained, counted), `eval_targets`.

    **Set by itself**: `remove_unused_columns`, `dispatch_batches`, `dataset_kwargs`, the collator. The loss is on
    answers only, whatever `assistant_only_loss` says.

    **Refused by name**: `packing`, `eval_packing`, `padding_free`, `use_liger_kernel`, `loss_type="dft"`,
    `completion_only_loss=False`, `label_smoothing_factor`, `neftune_noise_alpha`, `router_aux_loss_coef` (0 here),
    `formatting_func`, `compute_loss_func`, `compute_metrics`, and the collators of transformers and trl.

    Args:
        model: A name or a model.
        args: trl's `SFTConfig`.
        data_collator: `fr.Collator(length)`, if rows are to have one length.
        train_dataset: Conversations or layouts.
        eval_dataset: The same, or several by name.
        processing_class: The tokenizer, if it is not the model's.
        encode: `fr.EntryEncoder(tokenizer, ...)`, for its options: `turns="last"` trains on last turns only,
            `accept="..."` takes dirty answers, others go to the chat template (`enable_thinking=False`).
        skip_invalid: Go on without conversations that are refused, and tell of them.
        **others: As SFTTrainer's: `peft_config`, `quantization_config`, `callbacks`, `optimizers`, ...
    """

    def __init__(
        self,
        model: Any,
        args: Any = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *,
        encode: EntryEncoder | None = None,
        skip_invalid: bool = False,
        **others: Any,
    ) -> None:
        args = _arguments(model, args)
        _refuse_arguments(args, others)
        _refuse_data(train_dataset=train_dataset, eval_dataset=eval_dataset, data_collator=data_collator)
        forward, collator = _Forward(), Collator() if data_collator is None else copy.copy(data_collator)
        SFTTrainer.__init__(
            self,
            model=model,
            args=args,
            data_collator=collator,
            train_dataset=_stand_in(train_dataset),
            eval_dataset=_each(_stand_in, eval_dataset),
            processing_class=processing_class,
            **{**others, "callbacks": [*(others.get("callbacks") or ()), forward]},
        )
        self.remove_callback(forward)
        forward.put_back()
        prepared: Any = self.model  # with its adapters
        if find_patch(prepared) is None:
            patch_chunked(prepared, "auto", _warn)
        tokenizer = getattr(self.processing_class, "tokenizer", self.processing_class)  # of a processor
        self._encode, self._skip_invalid = encode or EntryEncoder(tokenizer), skip_invalid
        self._length = None
        if isinstance(collator, Collator):
            self._length, collator.encode = collator.length, collator.encode or self._encode
        self.train_dataset = self._layouts_of(train_dataset)
        self.eval_dataset = _each(self._layouts_of, eval_dataset)
        self._take_rows()

    def _layouts_of(self, data: Any) -> Any:
        """The data set with layouts in the place of conversations."""
        if data is None or isinstance(data, ROWS):
            return data
        args: Any = self.args
        with args.main_process_first(desc="encoding conversations"):  # the others find what it has kept
            data, refusals = encode_set(
                data,
                self._encode,
                longest=None if args.max_length == _default("max_length") else args.max_length,
                length=self._length,
                skip_invalid=self._skip_invalid,
                workers=args.dataset_num_proc,
            )
        if refusals.total:
            _warn("\n".join([f"{refusals.total} conversations are left out:", *refusals.lines()]))
        return data.shuffle(seed=args.seed) if args.shuffle_dataset and hasattr(data, "shuffle") else data

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return Trainer.compute_loss(self, *args, **kwargs)  # the model's own: trl's knows no weights of targets

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        return super().evaluate(_each(self._layouts_of, eval_dataset), *args, **kwargs)

    def predict(self, test_dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return super().predict(self._layouts_of(test_dataset), *args, **kwargs)


class _Forward(TrainerCallback):
    """Keeps the model's own forward, which trl replaces behind the Trainer's constructor."""

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.root = find_root(model)
        self.own = vars(self.root).get("forward")

    def put_back(self) -> None:
        vars(self.root).pop("forward", None)
        if self.own is not None:
            vars(self.root)["forward"] = self.own


def _arguments(model: Any, args: Any) -> Any:
    """The arguments as an SFTConfig of our own, with what rows need."""
    if args is None:
        name = model if isinstance(model, str) else model.config._name_or_path
        args = SFTConfig(f"{name.split('/')[-1]}-SFT")
    elif not isinstance(args, SFTConfig):
        args = SFTConfig(**{**args.to_dict(), "hub_token": args.hub_token})  # to_dict hides the token
    args = copy.copy(args)
    args.dataset_kwargs = {**(args.dataset_kwargs or {}), "skip_prepare_dataset": True}
    args.assistant_only_loss = False  # trl would look for marks of its own in the chat template
    return args


def _refuse_arguments(args: Any, others: Mapping[str, Any]) -> None:
    """Raise where an argument contradicts rows."""
    found = {name: getattr(args, name, None) for name in CONTRADICTIONS}
    wrong = [(f"{name}={found[name]!r}", why) for name, why in CONTRADICTIONS.items() if found[name]]
    if args.loss_type != "nll":
        wrong.append((f"loss_type={args.loss_type!r}", "the loss of a row is the negative log-likelihood"))
    if args.completion_only_loss is False:
        wrong.append(("completion_only_loss=False", "a row has its targets in answers, and none in prompts"))
    if others.get("formatting_func") is not None:
        wrong.append(("formatting_func", "it makes one text of a conversation, and rows are made of its messages"))
    if others.get("compute_loss_func") is not None:
        wrong.append(("compute_loss_func", "it would shift a row's targets, which are in their places"))
    if "tokenizer" in others:
        raise ValueError("RowSFTTrainer: tokenizer: trl has another name for it; give processing_class=tokenizer")
    if wrong:
        name, why = wrong[0]
        raise ValueError(f"RowSFTTrainer: {name}: {why}; leave it out")
    args.router_aux_loss_coef = 0.0  # else trl takes that of the model's config


def _refuse_data(**given: Any) -> None:
    """Raise where what is given is no data set, or no collator that makes rows."""
    for name, data in given.items():
        if isinstance(data, str | Path) and name != "data_collator":
            raise ValueError(
                f"RowSFTTrainer: {name}: expected a data set, found the text {str(data)!r}; if it is a file, give "
                f'load_dataset("json", data_files={str(data)!r}, split="train")'
            )
    if isinstance(given["train_dataset"], dict):
        names = ", ".join(map(repr, given["train_dataset"]))
        raise ValueError(
            f"RowSFTTrainer: train_dataset: expected one data set, found several by name; give one: {names}"
        )
    collator = given["data_collator"]
    made_by = (getattr(collator, "__module__", None) or "").partition(".")[0]
    if made_by in ("transformers", "trl", "torch"):
        name = getattr(collator, "__name__", type(collator).__name__)
        raise ValueError(f"RowSFTTrainer: data_collator: {name} makes no rows; leave it out")


def _default(name: str) -> Any:
    return SFTConfig.__dataclass_fields__[name].default


def _stand_in(data: Any) -> Any:
    """What trl's constructor is shown in the place of a data set: it looks at the first entry, and whether all can be
    counted."""
    import datasets

    if data is None:
        return None
    entry = datasets.Dataset.from_dict({"input_ids": [[0]]})
    return entry if hasattr(data, "__len__") else entry.to_iterable_dataset()


def _each(call: Callable[[Any], Any], data: Any) -> Any:
    """A call for a data set, or for each of several under names. None, and the name of one, stay as they are."""
    if data is None or isinstance(data, str):
        return data
    return {name: call(one) for name, one in data.items()} if isinstance(data, dict) else call(data)


def _warn(words: str) -> None:
    warnings.warn(f"flexreason: {words}", stacklevel=3)
