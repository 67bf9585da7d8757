"""Learn topics from noisy labels with the Trainer of Hugging Face: plain and reweighted.

    pip install transformers accelerate peft
    python examples/trainer.py

A tiny BERT, random and so without a download, learns by a LoRA adapter. Two fifths of the training
labels name the next topic, forty other sentences are clean. With bfloat16 autocast, two
micro-batches a step, clipped gradients, and a checkpoint from which to resume.
"""

import shutil
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from l2rw_ext import CleanBatches, Reweighter

TOPICS, WORDS, LENGTH, EPOCHS = 4, 40, 12, 20
SETTINGS = {"bf16": True, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 50}
SETTINGS |= {"learning_rate": 5e-3, "lr_scheduler_type": "constant", "max_grad_norm": 1.0}
SETTINGS |= {"save_strategy": "epoch", "use_cpu": not torch.cuda.is_available()}


def losses(outputs: Any, labels: Tensor) -> Tensor:
    """One for each sentence; the loss of the model itself is their mean."""
    return nn.functional.cross_entropy(outputs.logits, labels, reduction="none")


class ReweightedTrainer(Trainer):
    """A Trainer with a clean set; an example of its data has its number in ``_idx``."""

    def __init__(self, *args: Any, clean: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.args.remove_unused_columns = False  # `_idx`, which the model does not take, is kept
        own = slice(self.args.process_index, None, self.args.world_size)  # of each process
        clean = {name: x[own] for name, x in clean[0].items()}, clean[1][own]
        self.clean_batches = CleanBatches(clean, device=self.args.device)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self.reweighter, self.resumed, self.waiting = None, {}, []  # not those of a training before
        return super().train(*args, **kwargs)

    def training_step(
        self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None
    ) -> Tensor:
        """Score and weigh all micro-batches of an optimiser step together."""
        model.train()
        if self.reweighter is None:  # begin with the model as Accelerate has wrapped it
            self.reweighter = Reweighter(model, losses)
            for name, state in self.resumed.items():
                getattr(self, name).load_state_dict(state)
        self.waiting.append(self._prepare_inputs(inputs))
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        scaler, found = self.accelerator.scaler, []
        with self.compute_loss_context_manager(), self.reweighter.accumulate() as accumulation:
            for batch in self.waiting:
                labels, index = batch.pop("labels"), batch.pop("_idx")
                clean = next(self.clean_batches) if self.reweighter.needs_clean else None
                step = self.reweighter.backward((batch, labels), clean, scaler, index)
                found.append(step.losses)
        self.waiting.clear()
        return torch.cat(found) @ torch.cat(accumulation.weights)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            state = {n: getattr(self, n).state_dict() for n in ("clean_batches", "reweighter")}
            torch.save(state, f"{output_dir}/reweighting.pt")

    def _load_optimizer_and_scheduler(self, checkpoint: str) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        self.resumed = torch.load(f"{checkpoint}/reweighting.pt")


def adapted_bert() -> nn.Module:
    """A random BERT with a LoRA adapter."""
    sizes = {"vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 64, "num_labels": TOPICS}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.1}
    lora = LoraConfig(task_type="SEQ_CLS", r=8, target_modules="all-linear")
    return get_peft_model(BertForSequenceClassification(BertConfig(**sizes, **layers)), lora)


def train(kind: Any, folder: str, data: Any, epochs: int, resume: bool, **options: Any) -> Trainer:
    """Train until an epoch, from the beginning or from the last checkpoint in the folder."""
    torch.manual_seed(0)
    arguments = TrainingArguments(folder, num_train_epochs=epochs, disable_tqdm=True, **SETTINGS)
    trainer = kind(adapted_bert(), arguments, train_dataset=data, **options)
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def main() -> None:
    """Train plainly and reweighted, each with a break in the middle."""
    torch.manual_seed(0)
    true, on_topic = torch.randint(TOPICS, (1440,)), torch.rand(1440, LENGTH) < 0.7
    words = torch.randint(WORDS, (1440, LENGTH))
    words = torch.where(on_topic, words - words % TOPICS + true[:, None], words)
    flipped = (torch.rand(1440) < 0.4) & (torch.arange(1440) < 1000)
    labels = (true + flipped) % TOPICS
    rows = [{"input_ids": words[i], "labels": labels[i], "_idx": i} for i in range(1440)]
    clean = {"input_ids": words[1000:1040]}, true[1000:1040]
    for kind, options in ((Trainer, {}), (ReweightedTrainer, {"clean": clean})):
        shutil.rmtree(f"topics-{kind.__name__}", ignore_errors=True)  # of an earlier run
        for epochs, resume in ((EPOCHS // 2, False), (EPOCHS, True)):
            trainer = train(kind, f"topics-{kind.__name__}", rows[:1000], epochs, resume, **options)
        right = trainer.predict(rows[1040:]).predictions.argmax(1) == true[1040:].numpy()
        trainer.accelerator.print(f"{kind.__name__}: test accuracy {right.mean():.3f}")
    found = trainer.reweighter.record.issues(labels[:1000]).is_label_issue
    precision = flipped[:1000].numpy()[found].mean()
    trainer.accelerator.print(f"{found.sum()} labels found, precision {precision:.3f}")


if __name__ == "__main__":
    main()
