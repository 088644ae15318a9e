"""What other tools call the keys of a recipe or a site file, for the suggestion in an error. None of them is a key."""

from __future__ import annotations

OTHER_NAMES: dict[str, str] = {
    "warmup": "train.warmup_steps",
    **dict.fromkeys(("learning_rate", "local_lr", "client_lr"), "train.lr"),
    **dict.fromkeys(
        ("epoch", "num_epochs", "num_train_epochs", "local_epochs", "n_epochs", "max_epochs"),
        "train.epochs",
    ),
    **dict.fromkeys(("local_steps", "max_steps", "n_steps"), "train.steps"),
    **dict.fromkeys(("batch", "bs", "per_device_train_batch_size", "train_batch_size"), "train.batch_size"),
    **dict.fromkeys(("gradient_accumulation_steps", "microbatch"), "train.micro_batch"),
    **dict.fromkeys(("scheduler", "lr_scheduler", "lr_scheduler_type"), "train.lr_schedule"),
    **dict.fromkeys(("optim", "optimiser"), "train.optimizer"),
    **dict.fromkeys(("clip_grad", "grad_clip", "gradient_clipping"), "train.max_grad_norm"),
    **dict.fromkeys(("lora_r", "lora_rank", "r"), "adapter.rank"),
    "lora_alpha": "adapter.alpha",
    "lora_dropout": "adapter.dropout",
    **dict.fromkeys(("lora_target_modules", "modules_to_adapt"), "adapter.target_modules"),
    **dict.fromkeys(
        ("model_name", "model_name_or_path", "base_model", "pretrained_model_name_or_path", "checkpoint"),
        "model.source",
    ),
    **dict.fromkeys(("max_seq_length", "max_seq_len", "seq_length", "seq_len", "cutoff_len"), "model.max_length"),
    **dict.fromkeys(
        ("dtype", "torch_dtype", "bf16", "fp16", "load_in_8bit", "load_in_4bit", "quantization"), "model.precision"
    ),
    **dict.fromkeys(("num_rounds", "n_rounds", "num_server_rounds", "communication_rounds"), "rounds"),
    **dict.fromkeys(("random_seed", "random_state"), "seed"),
    **dict.fromkeys(("algorithm", "fl_method", "strategy"), "method.name"),
    **dict.fromkeys(("fraction_fit", "fraction_train", "client_fraction", "sample_fraction"), "server.fraction"),
    **dict.fromkeys(("min_fit_clients", "min_available_clients", "min_train_nodes"), "server.quorum"),
    **dict.fromkeys(("server_lr", "server_learning_rate"), "server.lr"),
    **dict.fromkeys(("num_clients", "clients", "n_clients", "num_sites", "num_supernodes"), "partition.sites"),
    **dict.fromkeys(("dataset", "dataset_name", "data_path", "data_file", "train_file", "file", "path"), "data.source"),
    **dict.fromkeys(("test_file", "validation_file", "eval_file", "test_path"), "data.test_source"),
    **dict.fromkeys(("test_size", "val_split", "validation_split", "test_split"), "data.test_fraction"),
    **dict.fromkeys(("text_column", "text_field", "input"), "data.text"),
    **dict.fromkeys(("label_column", "target", "target_column", "class"), "data.label"),
    **dict.fromkeys(("answer", "response", "output"), "data.completion"),
    **dict.fromkeys(("question", "instruction"), "data.prompt"),
    **dict.fromkeys(("sep", "separator"), "data.delimiter"),
    **dict.fromkeys(("server_address", "superlink", "url"), "coordinator.address"),
}
