"""Stage 3: from a foundation model and rows of a table to a model of a task, in a run directory.

    rows -> examples -> a head on a model -> trainer -> RUN/model, README, report

Decisions:
- Every task starts from a run, a Hugging Face directory or a hub name, of any family that has a head for it, and ends in
  a directory that the ecosystem opens and that says the same there.
- The model that is kept is that of the best evaluation; who stops improving is stopped.
- A trained model is moved gently: AdamW, at a rate that falls with the size of the model. One that is small and was trained for
  minutes knows little that could be lost: Muon, when asked for (`finetune.optimizer`), teaches it in a third of the steps (docs/log.md).
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import math
from pathlib import Path
from typing import Any

import torch

from threefold import console, files, rundir, stage
from threefold import device as machine
from threefold.config import Recipe, load_recipe
from threefold.data import examples as sets
from threefold.data.examples import Examples
from threefold.errors import ConfigError
from threefold.evaluation.loss import evaluating
from threefold.generation.arguments import id_set, settings_of
from threefold.model import adapters
from threefold.model.base import Model
from threefold.model.build import matrix_parts
from threefold.model.classifiers import PooledClassifier
from threefold.model.grow import resized
from threefold.model.lowrank import Shape
from threefold.model.pooling import Pooling, read_pooling, write_pooling
from threefold.model.quantize import quantize, stored_bytes
from threefold.model.weights import load_model
from threefold.objectives.embed import Embed
from threefold.objectives.heldout_rows import HeldOutRows
from threefold.objectives.preference import Dpo, log_probabilities
from threefold.objectives.rows import RowObjective, filler
from threefold.objectives.term import Objective, Sums, Term, labelled
from threefold.pretrain import pretrain
from threefold.stage import Learning, Request, Stage
from threefold.strict_json import read_object
from threefold.task_rows import Checked, TaskRows, batch_rows, check, task_rows, train_batches
from threefold.text.pretrained import PretrainedTokenizer
from threefold.training.card import task_card
from threefold.training.decisions import Value
from threefold.training.length import Limits
from threefold.training.log import Line
from threefold.training.optim import Optimizer
from threefold.training.search import around, best_rate

RATE, RATE_AT = 1e-4, 22e6   # AdamW's rate for a model of so many parameters; it falls with the root of their number
MUON_RATE, BESIDE = 0.01, 0.4  # Muon's rate, and how much of it AdamW has beside
PATIENCE = 4           # evaluations without improvement
EVALUATIONS = 10       # of a run whose end is known
VOCABULARY = ("transformer.embed.weight", "lm_head.weight")  # what new tokens are learnt in, beside an adapter too
FEWEST_TRIED = 20      # steps of a trial of a learning rate
COST_ROWS = 200        # of held-out rows, to say what few bits cost
ROOMY = 0.8            # of a GPU's free memory may be taken by a base before it is put into few bits
SUBSET_TOKENS = 65536  # of held-out rows, for evaluations on the way


def finetune(recipe: Recipe, request: Request) -> dict[str, Any]:
    """Run a recipe with a task in `request.out`, from wherever that run stands; returns the last evaluation.

    Raises a ThreefoldError that says what to mend; Interrupted after a signal, with a checkpoint saved.
    """
    return stage.run(recipe, request, _refused(recipe, request), FineTuning)


def train(recipe: Recipe | str | Path, out: str | Path = "runs/latest", **how: Any) -> dict[str, Any]:
    """Run a recipe, or the TOML file of one, in the run directory `out`: what `threefold pretrain` does, or where it has a task
    `threefold finetune` and `align`.

    `how` are fields of `Request` (fresh, force, replay, ...). The same call again resumes.
    """
    found = recipe if isinstance(recipe, Recipe) else load_recipe(Path(recipe), warn=console.warn)
    return (finetune if found.finetune.task else pretrain)(found, Request(out=Path(out), **how))


def dry_run(recipe: Recipe, request: Request | None = None) -> dict[str, Any]:
    """What a run would learn from, checked as the run checks it, with nothing written: all rows are read and encoded. With a
    `request` its folder and log are looked at too."""
    checked = check(recipe) if request is None else _refused(recipe, request)
    if request is not None and not request.fresh:
        rundir.compare(recipe, request.out, force=request.force)
    found = task_rows(recipe, checked.origin, checked.head, checked.context)
    return {"learnt": len(found.train), "held_out": len(found.held), "cut": found.cut, "rows": batch_rows(recipe, found),
            "tokens": sum(item.length for item in found.train), "head": checked.head, "context": checked.context, "recipe": recipe.flat()}


def _refused(recipe: Recipe, request: Request) -> Checked:
    """What the check finds, of the recipe and of the place where the result is to go, before anything is written."""
    checked = check(recipe)
    stage.refused(request, [checked.origin, *(Path(p) for p in (*recipe.data.paths, recipe.finetune.val) if p and Path(p).exists())])
    return checked


class FineTuning(Stage):
    """A run that learns from rows."""

    reading = "reading and encoding rows"
    found: TaskRows
    words: PretrainedTokenizer
    learns: RowObjective
    held_out: HeldOutRows

    def __init__(self, recipe: Recipe, request: Request, checked: Checked, started: float, **more: Any) -> None:
        super().__init__(recipe, request, checked, started, **more)
        self.source, self.head, self.context = checked.origin, checked.head, checked.context

    # -- rows to examples ----------------------------------------------------------------------------------------------

    def prepare(self, bar: console.Progress) -> None:
        """Read, divide and encode the rows."""
        found = task_rows(self.recipe, self.source, self.head, self.context, tell=bar.update)
        self.found, self.words, self.tokenizer, self.learns = found, found.words, found.words.core, found.learns

    def _held(self, rows: int, model: Model) -> Examples:
        return Examples(self.found.held, rows, 0, pad=filler(self.words), vocab_size=model.config.vocab_size, name="held-out rows")

    # -- model and training --------------------------------------------------------------------------------------------

    def plan(self) -> dict[str, Any]:
        """Batch and dtype."""
        choice = machine.pick_dtype(self.recipe.train.dtype, self.device)
        rows = batch_rows(self.recipe, self.found)
        counts = {"learnt": len(self.found.train), "held_out": len(self.found.held), "cut": self.found.cut}
        return {**counts, "dtype": str(choice.dtype).removeprefix("torch."), "why_dtype": choice.why, "context": self.context, "rows": rows}

    def objective(self, plan: Value) -> Objective:
        """That of the task."""
        return self.learns

    def model(self, plan: Value, objective: Objective) -> Model:
        """The model that is started from, with the head of the task."""
        labels, how = tuple(getattr(self.learns, "labels", ())), self.recipe.finetune.pooling
        model = load_model(self.source, torch.float32, task=self.head, for_labels=labels or None,
                           pooling=None if how == "auto" else how, seed=self.recipe.train.seed)
        console.notes(model.notes)
        model.labels = labels
        if isinstance(self.learns, Embed) and self.learns.pooling == "auto":
            before = read_pooling(self.source)
            self.learns.pooling = before.how if before else "mean" if model.config.num_encoder_layers else "last"
        if isinstance(self.learns, Embed) and max(self.learns.dims, default=0) > model.config.hidden_size:
            raise ConfigError(f"`finetune.dims` holds {max(self.learns.dims):,}, and vectors of this model have {model.config.hidden_size:,} numbers",
                              hint="name lengths up to that")
        new, rows = self.recipe.finetune.add_tokens, model.config.vocab_size
        if self.words.chat_template is not None or new:
            rows = max(rows, len(self.words))
        model = resized(model, vocab_size=rows, context=max(self.context, model.config.max_position_embeddings))
        if model.config.pad_token_id is None and self.words.pad_token_id is not None:
            model.config = dataclasses.replace(model.config, pad_token_id=self.words.pad_token_id)
        model.generation_config = settings_of(self.source)  # by which its texts are judged on the way, too
        if (share := self.recipe.finetune.dropout) is not None:
            for module in model.modules():
                if hasattr(module, "dropout"):
                    setattr(module, "dropout", share)  # noqa: B010
        self._freeze(model)
        if (lora := self.recipe.lora).rank:
            if lora.base_bits:
                roomy = self.device.type == "cpu" or stored_bytes(model) < ROOMY * machine.available_memory(self.device)
                self._quantize(self._placed(model, plan) if roomy else model, lora.base_bits, measured=roomy)
            shape = Shape(lora.rank, lora.alpha or 2.0 * lora.rank, lora.dropout)
            adapters.attach(model, shape, lora.targets, seed=self.recipe.train.seed, whole=VOCABULARY if new else ())
        return model

    def _quantize(self, model: Model, bits: int, *, measured: bool) -> None:
        """Put the base into few bits, and say what that costs it: of a model that writes, in loss on held-out answers, where it is
        `measured`: a base that a GPU has no room for as it is would take hours on the CPU."""
        def loss() -> float | None:
            if self.learns.name not in ("instruct", "seq2seq", "dpo") or resumed or not measured:
                return None
            sums = Sums()
            with evaluating(model):
                for _, batch in held.once(COST_ROWS):
                    batch = batch.to(model.device)
                    if isinstance(self.learns, Dpo):  # of its answers, chosen and rejected; nothing is preferred yet
                        sums.add([Term("answers", -log_probabilities(model, batch).sum(), labelled(batch))])
                    elif all(self.learns.weights(batch).values()):
                        sums.add(self.learns.terms(model, batch))
            return sums.loss("held-out rows")
        held, resumed = self._held(8, model), any((self.run / "checkpoints").glob("step-*"))  # whoever goes on has been told
        size, before = stored_bytes(model), loss()
        error, after = quantize(model, bits), loss()
        said = f"the base in {bits} bits: {stored_bytes(model) / 1e6:,.1f} MB instead of {size / 1e6:,.1f}, weights {error:.2%} off"
        if before is not None and after is not None:
            said += (f"; before learning, perplexity {math.exp(min(after, 50.0)):.4g} instead of {math.exp(min(before, 50.0)):.4g} on "
                     f"{min(COST_ROWS, len(self.found.held)):,} held-out rows")
        console.note(said)

    def _freeze(self, model: Model) -> None:
        if not (count := self.recipe.finetune.freeze):
            return
        depths = {name: depth for name, depth in depth_of(model).items() if depth <= count}
        if max(depth_of(model).values()) <= count:
            raise ConfigError(f"`finetune.freeze` is {count}, and the model has {model.config.num_hidden_layers} layers: nothing would be learnt "
                              "but the head", hint="freeze fewer layers")
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in depths)

    def learning(self, model: Model, objective: Objective, plan: Value) -> Learning:
        """Batches of rows, AdamW, and an end after some epochs or when nothing improves."""
        t, f, rows = self.recipe.train, self.recipe.finetune, int(plan["rows"])
        if isinstance(self.learns, Dpo) and not self.recipe.lora.rank:  # as it is now, before a checkpoint is read
            self.learns.reference = copy.deepcopy(model).eval().requires_grad_(False)
        loader = train_batches(self.recipe, self.found, self.context, rows, model.config.vocab_size)
        held = self._held(rows, model)
        steps, usual = t.steps, max(1, math.ceil(f.epochs * loader.epoch_steps))
        if steps is None and t.tokens is None and t.budget is None and t.until is None:
            steps = usual
        elif t.tokens is not None:
            steps = min(steps or t.tokens, math.ceil(t.tokens / loader.tokens_per_step))
        self.held_out = HeldOutRows(model, self.learns, held)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        matrices = matrix_parts(model) if f.optimizer == "muon" else {}
        rate = t.learning_rate or (MUON_RATE if matrices else RATE * (RATE_AT / max(trained, 10**5)) ** 0.5)
        decay = f.layer_decay
        depths = depth_of(model)
        top = max(depths.values()) + 1
        scales = {name: decay ** (top - depth) for name, depth in depths.items()} if decay != 1 else {}

        def optimizer(rate: float) -> Optimizer:
            return Optimizer(model, matrices, lr=rate, adamw_lr=t.adamw_learning_rate or BESIDE * rate, weight_decay=t.weight_decay,
                             betas=(0.9, 0.98), iterate_in=torch.bfloat16 if model.compute_dtype == torch.bfloat16 else None, scales=scales)

        if f.rates > 1:
            found = self.decisions.make("rate", 0, lambda: best_rate(
                around(rate, f.rates), max(FEWEST_TRIED, (steps or 0) // 10), model, objective, loader, optimizer,
                lambda: self.held_out(SUBSET_TOKENS), self.run, micro_batch=min(rows, t.micro_batch or rows)))
            assert found is not None
            rate = float(found["rate"])
            console.note(f"learning rate {rate:.3g}, of {', '.join(found['tried'])}")
        return Learning(
            loader=loader,
            optimizer=optimizer(rate),
            evaluate=self.held_out,
            limits=Limits(steps=steps, budget=t.budget, converged=True, patience=t.patience or PATIENCE),
            eval_every=t.eval_every or (0 if t.budget is not None else max(1, (steps or usual) // EVALUATIONS)),
            evaluations=EVALUATIONS,
            held_out=int(held.lengths.sum()),
            validation_tokens=SUBSET_TOKENS,
            rows=rows,
            take_best=True,
        )

    # -- the result ----------------------------------------------------------------------------------------------------

    def data_identity(self) -> dict[str, Any]:
        """Fingerprints of the rows, of the tokenizer, and of what stays as it is."""
        found = {"data_fingerprint": sets.fingerprint([*self.found.train, *self.found.held]), "tokenizer_fingerprint": self.tokenizer.fingerprint}
        if self.recipe.lora.rank or self.recipe.finetune.freeze or self.recipe.finetune.task == "dpo":
            found["base_sha256"] = weights_hash(self.source)
        return found

    def write(self, model: Model, folder: Path) -> None:
        """An adapter, or the model; how vectors are made; what was chosen on held-out rows, under our name."""
        if self.recipe.lora.rank:
            named = self.recipe.model.from_model
            base = str(self.source.resolve()) if Path(named).exists() else named
            adapters.save(model, folder, base, whole=VOCABULARY if self.recipe.finetune.add_tokens else ())
        else:
            super().write(model, folder)
        if model.task in ("causal", "seq2seq"):
            self._write_settings(model, folder)
        if isinstance(self.learns, Embed):
            write_pooling(folder, Pooling(self.learns.pooling, longest=self.context), width=model.config.hidden_size)
        path = folder / (adapters.DETAILS if self.recipe.lora.rank else "config.json")
        kept = json.loads(path.read_bytes()) if path.exists() else {}
        if self.recipe.lora.rank:
            kept["base"] = adapters.print_of(self.source)
        if kind := getattr(self.learns, "kind", None):
            kept["problem_type"] = kind
        if settled := self.learns.settle(model, self.held_out.judged):
            kept["threefold"] = settled
        if kept:
            files.write_file(path, json.dumps(kept, indent=2) + "\n")

    def _write_settings(self, model: Model, folder: Path) -> None:
        """How texts are written: as by the model that was started from, with what ends an answer now."""
        path, before = folder / "generation_config.json", model.generation_config
        own = read_object(path)
        ends = self.words.turn_ends() if model.task == "causal" else frozenset()
        eos = sorted(id_set(before.get("eos_token_id")) | id_set(own.get("eos_token_id")) | ends)
        settings = {**before, **own, **({"eos_token_id": eos[0] if len(eos) == 1 else eos} if eos else {})}
        if settings:
            files.write_file(path, json.dumps(settings, indent=2) + "\n")

    def save_tokenizer(self, folder: Path, context: int) -> None:
        """With what was loaded beside the ids: a second side for translations, a chat template."""
        if self.words.target is None:
            super().save_tokenizer(folder, context)
        else:
            self.words.config["model_max_length"] = context
            self.words.save_pretrained(folder)

    def card(self, model: Model, evaluation: Line) -> str:
        """The model card."""
        return task_card(self.recipe, model.config, model.num_parameters(), len(self.found.train), len(self.found.held), evaluation,
                         pooled=isinstance(model, PooledClassifier))


def weights_hash(folder: Path) -> str:
    """A hash of the weights of a model directory."""
    return hashlib.sha256("".join(files.sha256(path) for path in sorted(folder.glob("*.safetensors"))).encode()).hexdigest()


def depth_of(model: Model) -> dict[str, int]:
    """Where each parameter of the body stands: 0 for embeddings, n for the n-th layer from the bottom; heads are left out."""
    found, below = {}, model.config.num_encoder_layers  # layers under a decoder's
    for name, _ in model.named_parameters():
        if not name.startswith("transformer."):
            continue
        parts = name.split(".")
        at = int(parts[parts.index("blocks") + 1]) + 1 if "blocks" in parts else 0
        if parts[1] == "decoder":
            at += below * bool(at)
        if parts[2] == "norm":  # the last norm goes with the last layer
            at = below if parts[1] == "encoder" else below + model.config.num_decoder_layers
        found[name] = at
    return found
