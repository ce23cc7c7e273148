"""The names that TRL's and transformers' trainers give to options, and what stands for each of them here.

A name is in ALIASES where it means exactly what an option of ours means, in the same unit: it is then
accepted.  Every other name is in INSTEAD, which says what to give instead, or that there is no such thing.
`differing` refuses an alias where other options of the run make it mean something else.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

ALIASES = {  # TRL's name -> ours, on the command line and in files
    "model_name_or_path": "model",
    "dataset_name": "dataset",
    "chat_template_path": "chat_template",
    "reward_funcs": "reward",
    "num_generations": "group",
    "learning_rate": "optim.lr",
    "adam_beta1": "optim.beta1",
    "adam_beta2": "optim.beta2",
    "adam_epsilon": "optim.eps",
    "weight_decay": "optim.weight_decay",
    "max_grad_norm": "optim.clip",
    "save_steps": "save.every",
    "save_total_limit": "save.keep",
    "max_completion_length": "max_new_tokens",
    "max_steps": "steps",
    "temperature": "sampling.temperature",
    "top_p": "sampling.top_p",
    "top_k": "sampling.top_k",
    "min_p": "sampling.min_p",
    "loss_type": "algorithm",
    "beta": "kl_coef",
    "neftune_noise_alpha": "neftune_alpha",
    "label_smoothing_factor": "label_smoothing",
    "discopop_tau": "tau",
    "num_iterations": "epochs",
    "mask_truncated_completions": "overlong_filter",
    "vllm_importance_sampling_mode": "correction",
    "vllm_importance_sampling_clip_min": "correction_min",
    "vllm_importance_sampling_clip_max": "correction_max",
    "center_rewards_coefficient": "center",
    "num_ppo_epochs": "epochs",
    "num_mini_batches": "minibatches",
    "cliprange": "epsilon",
    "cliprange_value": "value_clip",
    "kl_estimator": "kl",
}
ONLY: Mapping[str, Collection[str]] = {  # the commands in which a name means the same, where not in all
    "label_smoothing_factor": ("sft",),
    "discopop_tau": ("dpo",),
}

# --- where an alias would mean something else -------------------------------------------------------
PER_UPDATE = ("max_steps", "save_steps")
"""Names that count optimizer steps, where ours count batches of prompts."""
OTHER_ROWS = ("dapo", "dr_grpo")
"""Values of loss_type whose row has other constants than the paper's in TRL: those of --semantics trl."""
BOUNDS = {  # values of vllm_importance_sampling_mode -> our bounds, where they are not TRL's 0 and 3
    "token_truncate": ("correction_max",),
    "token_mask": ("correction_min", "correction_max"),
    "sequence_truncate": ("correction_max",),
}


def differing(typed: Mapping[str, str], values: Mapping[str, object]) -> str | None:
    """What is wrong with an alias that does not mean here what it means in TRL; None where all do.

    typed   our name of an option -> TRL's, for those that were given by TRL's
    values  every option by its path
    """
    updates = _number(values.get("minibatches")) * _number(values.get("epochs"))
    for ours in typed:
        if typed[ours] in PER_UPDATE and updates > 1:
            return (
                f"{typed[ours]}: it counts optimizer steps, and with these minibatches and epochs a step "
                f"here makes {updates} of them; give --{ours}, which counts batches of prompts"
            )

    row = values.get("algorithm")
    if "algorithm" in typed and row in OTHER_ROWS and values.get("semantics") == "paper":
        return (
            f"loss_type: TRL's {row} has other constants than the paper's; add --semantics trl for TRL's, "
            f"or write --algorithm {row} for the paper's"
        )

    mode = values.get("correction")
    missing = [option for option in BOUNDS.get(str(mode), ()) if values.get(option) is None]
    if "correction" in typed and missing:
        bounds = " and ".join(f"--{option.replace('_', '-')}" for option in missing)
        return (
            f"vllm_importance_sampling_mode: without bounds TRL's {mode} is cut at 3 (and not from below), "
            f"ours elsewhere; give {bounds}, or write --correction {mode} for our bounds"
        )
    return None


def _number(value: object) -> int:
    """A count, 1 for a command without it."""
    return value if isinstance(value, int) else 1


# --- names without an alias -------------------------------------------------------------------------
_WHOLE = (
    "--prompts is the whole batch of a step, over all processes, and --micro-tokens the tokens of one pass; "
    "--prompts = per-device batch x accumulation x processes, for completions divided by --group"
)
_EPOCHS = "give --steps: epochs x rows / --prompts"
_PASSES = "the batch is cut by itself into passes of --micro-tokens"
_EVALUATION = "evaluations are set by --eval.prompts and --eval.every"
_TRACKERS = "there are no trackers; a run writes metrics.jsonl, TensorBoard events and report.html"
_EVERY_STEP = "there is no interval; every step is logged"
_HUB = "there is no upload; push the checkpoint folder with the `hf` tool"
_SHARDS = "there is no sharding; torchrun trains with a copy of the weights in every process"
_LOADER = "there is no data loader; batches are made from the seed and the step"
_COMPILE = "there is no such option; the ops are fused kernels already"
_DTYPE = "give --dtype bfloat16 or float32; master weights are always float32"
_LOW_PRECISION = "there is no such option; --dtype chooses between float32 and bfloat16"
_LORA = "there are no adapters; all weights are trained"
_QUANTISED = "there are no quantised weights; --dtype chooses between float32 and bfloat16"
_PACKED = "there is no padding; every batch is packed, each sequence attends to itself alone"
_CUT = "--max-tokens is the longest sequence; a longer one is an error that names its line, not truncated"
_RESUME = "give --resume, which continues from the newest checkpoint of --output-dir"
_SAVING = "checkpoints are set by --save.every, --save.minutes and --save.keep; the last step is always saved"
_BEST = "there is no best checkpoint; the newest --save.keep stay"
_TOKENIZER = "the tokenizer's own is used; change it in the folder of --tokenizer"
_VLLM = "there is no such option; --sampler vllm runs vLLM inside the run"
_SYNCED = "there is no moving reference; it is the model that the run began with"
_REFERENCE = "give --reference precomputed (the default of losses with a reference) or live"
_ALWAYS = "it is always so; leave it out"
_ABSENT = "there is no such option; leave it out"
_SCHEDULE = "give --optim.schedule constant, linear or cosine, with --optim.warmup and --optim.floor"
_WARMUP = (
    "give --optim.warmup N, whose first step has 1/N of the peak rate (TRL's has 0); a share is N / --steps"
)
_SHUFFLE = "the order is drawn anew every pass from --seed"
_ROLLOUT = "give --minibatches, the optimizer steps per rollout batch of --prompts x --group completions"
_SAMPLES = "samples.jsonl and report.html hold completions of every step"
_ENTROPY = "there is no adaptive entropy bonus; --entropy-coef is its constant weight"
_ROUTER = "there is no auxiliary loss of routers"
_SPLIT = "--dataset is a file; write the rows to train on into one"
_REPRODUCIBLE = "there is no such option; runs repeat bit for bit on the same machine"
_DIVERGENCE = "take --algorithm dpo_forward_kl, dpo_js or dpo_alpha; dpo is the reverse KL"
_CONSTANTS = "the row's constants are the paper's; they have no option"
_KWARGS = "there are no keyword arguments; each setting is an option of its own"

_TABLE = (  # names, separated by blanks, and what to give instead
    # how long, how much
    ("num_train_epochs num_epochs epochs", _EPOCHS),
    ("per_device_train_batch_size per_device_batch_size train_batch_size batch_size", _WHOLE),
    ("gradient_accumulation_steps auto_find_batch_size", f"{_PASSES}; {_WHOLE}"),
    ("generation_batch_size steps_per_generation", _ROLLOUT),
    ("total_episodes", "give --steps: episodes / (--prompts x --group)"),
    ("max_length max_seq_length truncation_mode max_target_length", _CUT),
    ("max_prompt_length", "prompts are never cut; --max-tokens bounds prompt and completion together"),
    ("response_length", "give --max-new-tokens"),
    # the optimizer
    (
        "optim optim_args optim_target_modules",
        "the optimizer is AdamW; its settings are --optim.lr, --optim.beta1, --optim.weight-decay, ...",
    ),
    ("lr_scheduler_type lr_scheduler_kwargs", _SCHEDULE),
    ("warmup_steps warmup_ratio", _WARMUP),
    ("disable_dropout", "there is no dropout in training"),
    ("average_tokens_across_devices", f"losses are weighed over all processes: {_ALWAYS}"),
    # saving, logging, evaluating
    ("save_strategy save_only_model save_on_each_node save_safetensors enable_jit_checkpoint", _SAVING),
    ("load_best_model_at_end metric_for_best_model greater_is_better", _BEST),
    ("resume_from_checkpoint ignore_data_skip restore_callback_states_from_checkpoint", _RESUME),
    ("overwrite_output_dir", "a folder is never overwritten; name another --output-dir, or give --resume"),
    ("logging_steps logging_strategy logging_first_step", _EVERY_STEP),
    (
        "log_level log_level_replica log_on_each_node logging_nan_inf_filter disable_tqdm",
        "there is no log level; write the output to a file for plain lines without a progress bar",
    ),
    ("report_to project trackio_bucket_id trackio_space_id trackio_static_space_id", _TRACKERS),
    ("run_name logging_dir", "give --output-dir, the folder of everything a run writes"),
    ("include_num_input_tokens_seen include_tokens_per_second", "tokens are always logged"),
    (
        "log_completions num_completions_to_print log_unique_prompts log_multimodal log_completions_hub_repo",
        _SAMPLES,
    ),
    (
        "eval_strategy evaluation_strategy eval_steps eval_delay eval_on_start do_eval do_train "
        "do_predict per_device_eval_batch_size eval_accumulation_steps eval_do_concat_batches "
        "eval_use_gather_object eval_packing batch_eval_metrics prediction_loss_only "
        "include_for_metrics",
        _EVALUATION,
    ),
    ("num_generations_eval", "give --eval.samples"),
    # machines
    ("bf16 torch_dtype", _DTYPE),
    ("fp16 tf32 fp16_full_eval bf16_full_eval cast_lm_head_to_fp32", _LOW_PRECISION),
    ("use_cpu no_cuda local_rank use_mps_device", "give --device"),
    ("fsdp fsdp_config deepspeed accelerator_config parallelism_config", _SHARDS),
    ("ds3_gather_for_generation", _SHARDS),
    (
        "ddp_backend ddp_broadcast_buffers ddp_bucket_cap_mb ddp_find_unused_parameters "
        "ddp_static_graph ddp_timeout",
        "there is no such option; start several processes with torchrun",
    ),
    (
        "dataloader_drop_last dataloader_in_order dataloader_multiprocessing_context "
        "dataloader_num_workers dataloader_persistent_workers dataloader_pin_memory "
        "dataloader_prefetch_factor",
        _LOADER,
    ),
    (
        "torch_compile torch_compile_backend torch_compile_mode use_liger_kernel "
        "liger_kernel_config use_liger_loss attn_implementation",
        _COMPILE,
    ),
    (
        "gradient_checkpointing_kwargs activation_checkpointing activation_checkpointing_kwargs",
        "give --gradient-checkpointing, which has no settings",
    ),
    (
        "activation_offloading",
        "there is no offloading; --gradient-checkpointing and --micro-tokens save memory",
    ),
    ("torch_empty_cache_steps skip_memory_metrics", _ABSENT),
    ("full_determinism", _REPRODUCIBLE),
    # hub
    ("push_to_hub hub_always_push hub_model_id hub_private_repo hub_revision hub_strategy hub_token", _HUB),
    # models and tokenizers
    ("model_revision", "--model is a folder; download the revision you want"),
    ("tokenizer_name tokenizer_name_or_path", "give --tokenizer"),
    ("eos_token pad_token", _TOKENIZER),
    ("model_init_kwargs dataset_kwargs generation_kwargs", _KWARGS),
    ("chat_template_kwargs", "give it to each row, as a column chat_template_kwargs of the dataset"),
    ("router_aux_loss_coef", _ROUTER),
    ("use_cache", _ABSENT),
    (
        "use_peft lora_r lora_alpha lora_dropout lora_target_modules lora_target_parameters "
        "lora_modules_to_save lora_task_type use_rslora use_dora",
        _LORA,
    ),
    ("load_in_8bit load_in_4bit bnb_4bit_quant_type use_bnb_nested_quant bnb_4bit_quant_storage", _QUANTISED),
    ("ignore_bias_buffers", _ABSENT),
    # data
    ("dataset_config dataset_train_split dataset_test_split dataset_streaming datasets", _SPLIT),
    ("streaming test_split_size", _SPLIT),
    ("dataset_text_field", "rename the column: --columns NAME=text"),
    ("dataset_num_proc", "there is no such option; a dataset is read once, before the first step"),
    ("remove_unused_columns label_names length_column_name", _ABSENT),
    ("shuffle_dataset data_seed train_sampling_strategy group_by_length", _SHUFFLE),
    ("packing packing_strategy padding_free pad_to_multiple_of", _PACKED),
    ("completion_only_loss", "rows of prompt and completion count the completion, rows of text everything"),
    ("assistant_only_loss", "conversations count the assistant's turns; --turns last only the last of them"),
    # preferences
    ("precompute_ref_log_probs precompute_ref_batch_size", _REFERENCE),
    ("sync_ref_model ref_model_mixup_alpha ref_model_sync_steps", _SYNCED),
    ("loss_weights", "there is one loss; --nll-coef adds the chosen completion's cross-entropy to it"),
    ("rpo_alpha", "give --nll-coef"),
    ("ld_alpha", f"take --algorithm ld_dpo; {_CONSTANTS}"),
    ("f_divergence_type f_alpha_divergence_coef", _DIVERGENCE),
    ("use_weighting", "there is no weighting of pairs"),
    ("simpo_gamma", "give --gamma, with --algorithm simpo"),
    ("cpo_alpha", "give --nll-coef, with --algorithm cpo"),
    ("loss_type", "the loss is fixed by the command, and chosen by --algorithm where there is a choice"),
    ("discopop_tau", "give --tau, with fastrl dpo --algorithm discopop"),
    ("label_smoothing_factor", "give --label-smoothing, with an --algorithm that has it (cdpo, robust, exo)"),
    # rollouts
    ("use_vllm", "give --sampler vllm"),
    (
        "vllm_importance_sampling_correction",
        "give --correction (token_truncate, ...), or leave it out for none",
    ),
    ("vllm_importance_sampling_cap", "give --correction-max"),
    (
        "vllm_mode vllm_model_impl vllm_enable_sleep_mode vllm_structured_outputs_regex "
        "vllm_server_base_url vllm_server_host vllm_server_port vllm_server_timeout vllm_group_port "
        "vllm_gpu_memory_utilization vllm_max_model_length vllm_tensor_parallel_size",
        _VLLM,
    ),
    (
        "use_transformers_continuous_batching transformers_continuous_batching_config "
        "use_transformers_paged cache_implementation",
        "there is no such option; the sampler batches continuously over a paged cache of its own",
    ),
    ("repetition_penalty", "there is none: a penalised draw has no log-prob to train on"),
    ("importance_sampling_level", "take --algorithm gspo or luspo for the ratio of whole sequences"),
    (
        "sapo_temperature_neg sapo_temperature_pos vespo_k_pos vespo_lambda_pos vespo_k_neg vespo_lambda_neg",
        _CONSTANTS,
    ),
    ("top_entropy_quantile", "there is no mask of low-entropy tokens"),
    ("use_adaptive_entropy entropy_coef_min entropy_coef_max entropy_coef_delta entropy_target", _ENTROPY),
    ("max_tool_calling_iterations", "a task's step() ends an episode; see docs/tasks.md"),
    ("use_bias_correction_kl", "give --kl k3_is"),
    ("normalize_advantages", "give --advantage whiten or center_whiten"),
    ("reward_clip_range", "rewards are not clipped; bound them in the reward function"),
    ("num_iterations num_ppo_epochs", "give --epochs, the passes over a rollout batch"),
    ("num_mini_batches", "give --minibatches, the optimizer steps per rollout batch"),
    ("cliprange", "give --epsilon, which sets both bounds of the ratio"),
    ("cliprange_value", "only fastrl ppo clips values: --value-clip"),
    ("kl_estimator", "give --kl"),
)
INSTEAD: dict[str, str] = {name: advice for names, advice in _TABLE for name in names.split()}
