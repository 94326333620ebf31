"""minilora: LoRA written out in NumPy, for people who want to understand it and for people who want to use it.

    import minilora as ml
    model, tokenizer = ml.load("smollm2")
    ml.add_adapter(model, ml.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"), name="legal", seed=0)
    input_ids, labels = ml.collate(ml.encode_records(ml.read_records("legal")[:4], tokenizer))
    loss = ml.loss_and_grad(model, input_ids, labels)

Models
  load               a model and its tokenizer: "tiny", "smollm2", a GGUF file, a folder, or a name on huggingface.co
  pull               download a named model and verify its SHA-256
  save_model         write a whole model, fully fine-tuned or merged, as a Hugging Face folder or a GGUF file
  ModelFileError     raised for the file of a model or an adapter that is missing, damaged or does not fit
  Config             the shape of a Llama model
  Llama              the model: ids in, logits or a loss out
  generate           an answer to a conversation, whole or as a stream
  predict            labels, fields or answers for many texts, as the active adapter was trained
  Streams            many answers at a time, each with its own adapter

Adapters
  LoraConfig         rank, scale, target modules and variant of an adapter
  add_adapter        add a new adapter to a model and freeze the base
  set_adapter        choose the active adapter, or a weighted combination of several
  scale_adapter      multiply an adapter's update by a factor
  disable_adapter    run the base alone
  mixed_batch        a different adapter for each row of a batch
  merge_adapter      add the active adapter's update to the base's weights
  unmerge_adapter    restore the base's weights, bit for bit
  remove_adapter     remove an adapter from a model
  combine_adapters   combine several adapters into one
  delta_weight       the update of one matrix
  save_adapter       write an adapter as a PEFT folder
  load_adapter       read a PEFT folder or a llama.cpp adapter file
  lora_plus          LoRA+: a higher learning rate for B than for A
  count_parameters   trainable and frozen parameters
  adapter_state      an adapter's arrays, by name
  base_state         the base's arrays, by name
  sha256_of          the SHA-256 of such arrays
  audit              check what every adapter must satisfy
  AuditError         raised for the first check that fails

Gradients
  Tensor             an array and, for the backward pass, how it was computed
  op                 turn a function of arrays that returns its value and VJPs into an operation
  no_grad            compute without building a graph
  gradcheck          compare gradients with central differences
  GradientError      raised for the first gradient that is wrong: where, got, expected

Data
  read_records       the records of a file or folder (JSONL, CSV, Parquet, text), of dicts, or of "legal" and its like
  split_records      records by split: train, validation, test
  encode_record      one conversation as a sample: token ids, and labels for the answers alone
  encode_records     the same for many records
  encode_pairs       records with a chosen and a rejected answer as pairs, for DPO
  encode_text        a text, divided into samples
  Record             one conversation and what is known about it
  Sample             token ids and their labels
  Pair               a chosen and a rejected answer to one prompt, as samples
  collate            samples as the rows of a padded batch: input ids and labels
  DataError          raised for a data file, with a line for each kind of mistake

Training
  fit                train all trainable parameters, for some steps or until the validation loss stops falling
  History            the losses, seconds and tokens of a training run
  TrainingError      raised when the loss is no longer finite: at which step, and what to try
  with_reference     pairs with a model as DPO's reference: before training on them
  preferences        which of two answers a model prefers, and by how much more than its reference
  mean_loss          the loss per scored token over samples
  answer_all         a model's answers to the questions of records
  keyword_recall     the share of expected words that answers contain
  finetune           the whole job of `minilora finetune`: train, measure before and after, save
  Options            what `finetune` does: the flags of the command
  show_progress      print lines and progress bars on stderr, as the command line does
  loss_and_grad      the loss of a batch and its gradients, in micro-batches on all cores
  Step               what the memory of a training step depends on
  predict_memory     the memory of a step by owner (weights, activations ...), from shapes alone
  Module             named parameters and submodules
  Linear             y = x Wᵀ (+ bias): what adapters are put on, also in a module of your own
  Parameter          a tensor that a module owns
  SGD                stochastic gradient descent
  AdamW              Adam with decoupled weight decay
  clip_grad_norm     clip gradients to a global norm, in a training loop of your own

Importing this package loads NumPy and no other third-party package; the rest is loaded by what needs it.
"""

from .data.records import Record, read_records
from .data.rows import DataError
from .data.samples import encode_pairs, encode_record, encode_records, encode_text
from .data.splits import split_records
from .engine.gradcheck import GradientError
from .engine.tensor import Tensor, no_grad, op
from .files.disk import ModelFileError
from .generate.answers import generate
from .generate.predict import predict
from .generate.streams import Streams
from .lora.adapters import (
    adapter_state,
    add_adapter,
    base_state,
    delta_weight,
    disable_adapter,
    merge_adapter,
    remove_adapter,
    scale_adapter,
    set_adapter,
    unmerge_adapter,
)
from .lora.audit import AuditError, audit
from .lora.combine import combine_adapters
from .lora.config import LoraConfig
from .lora.mixed import mixed_batch
from .lora.peft import load_adapter, save_adapter
from .lora.variants import lora_plus
from .measure.counts import count_parameters
from .measure.loss import mean_loss
from .measure.predict import Step, predict_memory
from .measure.preferences import preferences, with_reference
from .measure.recall import answer_all, keyword_recall
from .models.hub import pull
from .models.load import load
from .models.merge import save_model
from .nn.gradcheck import gradcheck
from .nn.layers import Linear
from .nn.llama import Config, Llama
from .nn.module import Module, Parameter, sha256_of
from .nn.optim import SGD, AdamW, clip_grad_norm
from .nn.parts import Pair, Sample, collate
from .nn.step import loss_and_grad
from .progress import show_progress
from .train.job import finetune
from .train.loop import History, TrainingError, fit
from .train.options import Options
from .version import __version__

__all__ = [
    "SGD", "AdamW", "AuditError", "Config", "DataError", "GradientError", "History", "Linear", "Llama",
    "LoraConfig", "ModelFileError", "Module", "Options", "Pair", "Parameter", "Record", "Sample", "Step", "Streams",
    "Tensor", "TrainingError", "__version__", "adapter_state", "add_adapter", "answer_all", "audit", "base_state",
    "clip_grad_norm", "collate", "combine_adapters", "count_parameters", "delta_weight", "disable_adapter",
    "encode_pairs", "encode_record", "encode_records", "encode_text", "finetune", "fit", "generate", "gradcheck",
    "keyword_recall", "load", "load_adapter", "lora_plus", "loss_and_grad", "mean_loss", "merge_adapter",
    "mixed_batch", "no_grad", "op", "predict", "predict_memory", "preferences", "pull", "read_records",
    "remove_adapter", "save_adapter", "save_model", "scale_adapter", "set_adapter", "sha256_of", "show_progress",
    "split_records", "unmerge_adapter", "with_reference",
]  # fmt: skip
