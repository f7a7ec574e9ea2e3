"""What people type who come from diffusion-pipe, ltx-trainer, SimpleTuner, kohya's scripts, accelerate and
diffusers' examples: each name with the key that means it, or with what there is instead.

Owns the names alone; `meaning.py` finds the key in a schema. A name that says little, such as `type`, stands
with the section that it is typed in.
"""

from __future__ import annotations

_PHASE = "curriculum.phases[]."

# Key -> names for it; where several keys share a name, the first that the configuration's kind has counts.
_NAMES = {
    f"{_PHASE}learning_rate": "lr max_lr base_lr peak_lr initial_lr init_lr unet_lr transformer_lr dit_lr "
    "learningrate",
    f"{_PHASE}updates": "steps max_steps max_train_steps num_steps train_steps total_steps training_steps "
    "num_train_steps num_training_steps total_training_steps iterations num_iterations max_iterations "
    "train_iterations total_iterations iters max_iters num_updates total_updates training_updates",
    f"{_PHASE}epochs": "epoch num_epochs max_epochs n_epochs train_epochs num_train_epochs max_train_epochs",
    f"{_PHASE}micro_batch_size": "batch_size batch batchsize train_batch_size per_device_train_batch_size "
    "per_device_batch_size per_gpu_batch_size batch_size_per_gpu batch_size_per_device micro_batch "
    "micro_batch_size_per_gpu train_micro_batch_size_per_gpu micro_batch_size_per_device",
    f"{_PHASE}global_batch_size": "total_batch_size effective_batch_size global_batch",
    f"{_PHASE}accumulation": "grad_accum grad_acc gradient_accumulation gradient_accumulation_steps "
    "grad_accum_steps grad_accumulation_steps accumulation_steps accumulate_grad_batches accum_steps",
    f"{_PHASE}warmup_updates": "warmup warmup_steps num_warmup_steps lr_warmup lr_warmup_steps "
    "warmup_iterations warmup_iters",
    f"{_PHASE}schedule": "lr_scheduler lr_scheduler_type lr_schedule scheduler scheduler_type",
    f"{_PHASE}resolution": "resolutions image_size frame_size video_size train_resolution resolution_buckets",
    f"{_PHASE}duration": "video_length clip_length clip_duration",
    f"{_PHASE}duration.frames": "num_frames n_frames frame_count sample_n_frames max_frames max_num_frames "
    "target_frames number_of_frames",
    f"{_PHASE}duration.frame_rate_hz": "fps frame_rate framerate video_fps target_fps train_fps",
    f"{_PHASE}activation_checkpointing": "gradient_checkpointing enable_gradient_checkpointing "
    "use_gradient_checkpointing checkpoint_activations recompute",
    "shapes[].duration.frames": "num_frames n_frames frame_count",
    "shapes[].duration.frame_rate_hz": "fps frame_rate framerate",
    "duration.frames": "num_frames n_frames frame_count video_length",
    "duration.frame_rate_hz": "fps frame_rate framerate",
    "curriculum.phases": "stages",
    "training_mode": "train_mode finetune_mode finetuning_type finetune_type training_type train_type",
    "lora.rank": "rank r lora_rank lora_r lora_dim network_dim network_rank",
    "lora.alpha": "lora_alpha network_alpha",
    "lora.dropout": "lora_dropout network_dropout",
    "lora.targets": "target_modules lora_targets lora_target_modules",
    "lora": "adapter adapters peft peft_config lora_config network",
    "optimizer.weight_decay": "wd adam_weight_decay",
    "optimizer.betas": "adam_betas",
    "optimizer.epsilon": "eps adam_eps adam_epsilon",
    "optimizer.gradient_clip_norm": "max_grad_norm grad_clip grad_clip_norm gradient_clip "
    "gradient_clipping gradient_clip_val clip_grad_norm clip_grad max_norm",
    "checkpoint.every_updates": "save_steps save_every save_interval save_every_n_steps "
    "checkpointing_steps checkpoint_steps checkpoint_every checkpoint_interval "
    "checkpoint_step_interval save_every_n_updates checkpoint.interval checkpoint.every "
    "checkpoint.steps checkpoints.interval",
    "checkpoint.keep_last": "save_total_limit checkpoints_total_limit checkpoint_total_limit keep_last_n "
    "max_checkpoints num_checkpoints save_last_n_steps checkpoint.keep checkpoint.total_limit",
    "evaluation.every_updates": "eval_steps eval_every eval_interval eval_every_n_steps evaluate_every "
    "validation_steps validation_every validation_interval val_interval val_check_interval "
    "eval_step_interval evaluation.interval evaluation.every evaluation.steps validation.interval",
    "preview.every_updates": "sample_every_n_steps sample_steps sample_interval preview_every "
    "preview_steps validation_step_interval",
    "preview.prompts": "validation.prompts validation_prompt validation_prompts sample_prompts "
    "preview_prompts",
    "preview.guidance_scale": "cfg cfg_scale validation_guidance validation_guidance_scale",
    "preview.num_forwards": "num_inference_steps inference_steps validation_num_inference_steps "
    "sampling_steps",
    "sampling.num_forwards": "num_inference_steps inference_steps sampling_steps",
    "sampling.guidance_scale": "cfg cfg_scale",
    "prompts": "prompt",
    "empty_prompt": "negative_prompt",
    "output_dir": "output out_dir output_path output_folder save_dir save_path run_dir work_dir "
    "experiment_dir",
    "seed": "random_seed manual_seed",
    "model.pretrained": "pretrained_model_name_or_path pretrained_model pretrained_path "
    "pretrained_model_path model_path model_name_or_path ckpt_path diffusers_path transformer_path "
    "vae_path base_model model.path model.checkpoint model.name model.weights",
    "model.source": "model_class class_name model_class_name _class_name architecture model.type "
    "model.class model.target",
    "data.train": "dataset datasets dataset_path dataset_dir dataset_root train_dir train_data data.path "
    "data.dir data.root data.folder train_data_dir train_data_path training_data data_dir data_path "
    "data_root instance_data_dir instance_data_root preprocessed_data_root video_dir video_folder "
    "audio_dir dataset_config",
    "data.media": "dataset dataset_path data_dir data_path video_dir videos input input_dir media_dir",
    "data.validation": "val val_dir val_data validation_data validation_dir validation_data_dir eval_data "
    "eval_dataset eval_datasets",
    "data.num_workers": "workers dataloader_num_workers num_dataloader_workers max_data_loader_n_workers",
    "data.caption_dropout": "caption_dropout_rate caption_dropout_prob caption_dropout_probability "
    "caption_dropout_p",
    "data.random_flip": "flip flip_aug horizontal_flip random_horizontal_flip hflip",
    "data.sample_rate_hz": "sample_rate sampling_rate samplerate sr",
    "data.channels": "audio_channels num_audio_channels",
    "text.max_tokens": "max_length max_sequence_length max_text_length tokenizer_max_length",
    "engine.deepspeed_config": "deepspeed ds_config deepspeed_config_file deepspeed_json",
    "performance.attention": "attn_implementation attention_backend attention_mechanism",
    "report.flush_updates": "logging_steps log_steps log_every log_interval log_every_n_steps",
    "report.wandb.project": "wandb_project",
    "report.wandb.name": "wandb_name wandb_run_name",
    "report.wandb.entity": "wandb_entity",
    "loss.kl_weight": "kl kl_scale kl_loss_weight kld_weight kl_coef lambda_kl",
    "loss.perceptual_weight": "lpips_weight perceptual_loss_weight perceptual_scale lambda_perceptual",
    "loss.adversarial_weight": "disc_weight discriminator_weight gan_weight adv_weight lambda_adv",
    "loss.adversarial.start_update": "disc_start discriminator_start disc_start_step",
    "loss.feature_matching_weight": "feature_matching fm_weight lambda_feature",
    "loss.spectral_weight": "stft_weight spectral_loss_weight mrstft_weight",
    "loss.mel_weight": "mel_loss_weight lambda_mel",
    "loss.waveform_weight": "l1_weight time_weight",
    "loss.reconstruction": "recon_loss reconstruction_loss rec_loss pixel_loss",
    "loss.first_frame_probability": "first_frame_conditioning_p first_frame_conditioning_prob",
}
# Names, and what there is in place of a key of the same meaning.
_INSTEAD = (
    (
        "mixed_precision mixed_precision_mode precision dtype fp16 bf16 use_bf16 use_fp16 save_dtype",
        "Choose the precision by `engine.deepspeed_config`, such as `zero1_bf16` or `zero1_fp16_v100`.",
    ),
    (
        "zero zero_stage zero_optimization stage zero_config",
        "Choose the ZeRO stage by `engine.deepspeed_config`, for example `zero2_bf16`.",
    ),
    (
        "optimizer_type optimizer_name optim optim_type optimizer.type optimizer.name",
        "The optimizer is AdamW; leave the name out.",
    ),
    (
        "beta1 beta2 adam_beta1 adam_beta2",
        "Write both as `optimizer.betas`, for example `betas: [0.9, 0.95]`.",
    ),
    (
        "use_ema ema_decay ema_beta ema_rate",
        "Write an `ema:` section, where `half_life_samples` says how slowly the average follows.",
    ),
    (
        "report_to tracker trackers log_with use_wandb enable_wandb logger",
        "Set `tensorboard: true` or `wandb: {mode: online}` under `report`.",
    ),
    (
        "resume resume_from resume_from_checkpoint load_checkpoint resume_path",
        "Give `train` or `launch` the option --resume; a run goes on by itself without it.",
    ),
    (
        "min_lr lr_min lr_end min_lr_ratio end_lr",
        "Write `schedule` in each phase; its end is `final_learning_rate_ratio`.",
    ),
    (
        "torch_compile use_compile compile_model",
        "Set `compile: blocks` under `performance`.",
    ),
    (
        "enable_bucket enable_ar_bucket ar_buckets num_ar_buckets aspect_ratio_buckets frame_buckets",
        "Write `buckets: auto` in a phase, or list its shapes.",
    ),
    (
        "timestep_sampling timestep_sample_method timestep_sampling_mode flow_shift discrete_flow_shift",
        "The levels of noise are under `loss.noise_level`.",
    ),
    (
        "num_gpus gpus num_processes nproc_per_node n_gpus devices pipeline_stages",
        "The number of GPUs is given to `launch` or the launcher, and to `plan` as --world-size.",
    ),
    (
        "task model_type trainer_type training_strategy",
        "What is trained is `trainer` at the top level: audio_vae, diffusion or video_vae.",
    ),
)

ALIASES: dict[str, tuple[str, ...]] = {}
"""Name -> the places that may be meant."""
for _place, _names in _NAMES.items():
    for _name in _names.split():
        ALIASES[_name] = (*ALIASES.get(_name, ()), _place)
INSTEAD = {name: words for names, words in _INSTEAD for name in names.split()}
"""Name -> what to do in place of a key."""
