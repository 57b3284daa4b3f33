"""What the general rules of `tiny` cannot know: by model type, other configs, classes and inputs."""

from collections.abc import Callable
from typing import Any

import torch

VOCABULARY = 128
FIRST_ID = 64  # random ids lie above, special tokens below
WIDTH = 32
BATCH, TOKENS = 2, 12

_BOTH = ["sliding_attention", "full_attention"]
_GEMMA4 = {"global_head_dim": 16, "hidden_size_per_layer_input": 8, "layer_types": _BOTH}
_SERIES = {"prediction_length": 4, "context_length": 8, "lags_sequence": [1, 2], "num_time_features": 2, "input_size": 1}
_EFFICIENT = {
    "width_coefficient": 0.25, "depth_coefficient": 0.2, "hidden_dim": 320, "kernel_sizes": [3, 3, 5, 3, 5, 5, 3],
    "in_channels": [32, 16, 24, 40, 80, 112, 192], "out_channels": [16, 24, 40, 80, 112, 192, 320],
}  # fmt: skip
_HIERA = {
    "hidden_size": 16, "num_attention_heads": 1, "image_size": [64, 64], "blocks_per_stage": [1, 1, 2, 1],
    "embed_dim_per_stage": [16, 32, 64, 128], "num_attention_heads_per_stage": [1, 2, 4, 8],
    "window_size_per_stage": [8, 8, 8, 8], "global_attention_blocks": [3],
}  # fmt: skip
_HIERA_NECK = {"backbone_channel_list": [128, 64, 32, 16], "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]]}
_RESNET = {"embedding_size": 16, "hidden_sizes": [16, 32, 64, 128], "depths": [1, 1, 1, 1]}
_WINDOWS = {"n_window": 50, "n_window_infer": 200}
_DETR = {"encoder_in_channels": [32, 64, 128], "decoder_in_channels": [32, 32, 32], "encoder_hidden_dim": 32, "num_denoising": 0}
_STREAM = {"chunk_length": 16, "chunk_right_context": 4}
_SAM = {"image_size": 64, "patch_size": 16, "output_channels": WIDTH, "num_pos_feats": 16, "global_attn_indexes": [1]}
_SAM_PROMPT = {"image_size": 64, "patch_size": 16, "image_embedding_size": 4, "hidden_size": WIDTH}
_HGNET_DETR = {**_DETR, "encoder_in_channels": [64, 128, 256]}
_CODEC = {"upsample_groups": WIDTH}

_IMAGE_WORDS = {"<image>": 10, "<|extra_200|>": 11, "IMGIMGAZ": 12, "IMGIMGBZ": 13, "<|visual token 000000|>": 14}
_STAGES = [f"stage{i}" for i in range(1, 5)]
_RATIOS = {"long": 7, "mid": 5, "short": 3}
_ROPE = {"rope_theta": 1e4, "rope_type": "default", "mrope_section": [1, 1, 2]}
_STRIPES = {
    "reduce_channel": [1, 1, 0], "return_channel": [1, 1, 0],
    **{f"vertical_long_to_small_conv_{name}ratio": [[n, 1], 1, [n // 2, 0]] for name, n in _RATIOS.items()},
    **{f"horizontal_small_to_long_conv_{name}ratio": [[1, n], 1, [0, n // 2]] for name, n in _RATIOS.items()},
    **{f"symmetric_conv_long_{name}ratio": [[n, n], 1, [n // 2, n // 2]] for name, n in _RATIOS.items()},
}  # fmt: skip
_DEPTH_PRO = {f"{part}_model_config.image_size": 32 for part in ("image", "patch", "fov")}

# Fields that are set in every config of this type, wherever it stands; with dots, in this sub-config of it alone.
CONFIGS: dict[str, dict[str, Any]] = {
    "chameleon": {"vocabulary_map": _IMAGE_WORDS},
    "chmv2": {
        "backbone_config.out_indices": [1, 2, 3, 4],
        "backbone_config.num_hidden_layers": 4,
        "patch_size": 8,
        "backbone_config.return_class_token": True,
        "backbone_config.reshape_hidden_states": True,
        "backbone_config.patch_size": 8,
        "post_process_channels": [8, 16, 16, 32],
    },
    "clvp_encoder": {"hidden_size": 64, "num_attention_heads": 2},
    "clvp_decoder": {"hidden_size": 64, "num_attention_heads": 2},
    "depth_pro": {
        **_DEPTH_PRO,
        "patch_size": 32,
        "intermediate_hook_ids": [1, 0],
        "intermediate_feature_dims": [16, 16],
        "scaled_images_feature_dims": [32, 32, 16],
        "merge_padding_value": 1,
    },
    "emu3": {"vocabulary_map": _IMAGE_WORDS},
    "gemma3n_vision": {"architecture": "test_resnet"},
    "granite4_vision": {
        "deepstack_layer_map": [[0, 0], [1, 1]],
        "downsample_rate": "1/2",
        "vision_config.hidden_size": 64,
        "vision_config.num_attention_heads": 2,
    },
    "inkling_vision": {"patch_size": 4, "temporal_patch_size": 2},
    "lw_detr_vit": {"out_indices": [1, 2], "num_windows": 4},
    "lw_detr": {"projector_scale_factors": [1.0]},
    "molmo2": {"adapter_config.vision_feature_layer": [1, 0]},
    "molmo2_vision": {"image_size": [32, 32]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}, "layer_types": _BOTH},
    "perception_lm": {"vision_config.architecture": "test_vit", "vision_config.model_args": {"embed_dim": 64}},
    "phi4_multimodal_audio": {
        "ext_pw_out_channel": WIDTH,
        "depthwise_separable_out_channel": WIDTH,
        "nemo_conv_channels": WIDTH,
        "num_attention_heads": 4,
        "input_size": 80,
    },
    "pp_ocrv5_server_det": {"intraclass_block_config": _STRIPES, "scale_factor_list": [1, 2, 4, 8], "kernel_list": [3, 2, 2]},
    "pp_ocrv6_medium_det": {
        "backbone_config.out_features": _STAGES,
        "intraclass_block_config": _STRIPES,
        "scale_factor_list": [1, 2, 4, 8],
        "kernel_list": [3, 2, 2],
    },
    "qwen3_asr_encoder": _WINDOWS,
    "qwen3_omni_moe_audio_encoder": _WINDOWS,
    "qwen2_5_omni_audio_encoder": {"n_window": 16},
    "tvp": {"visual_prompt_size": 16, "max_img_size": 64, "num_frames": 2},
    "pp_lcnet_v4": {
        "stem_channels": [3, 8, 16],
        "block_configs": [[[3, 16, 16, 1, False]], [[3, 16, 32, 2, False]], [[3, 32, 64, 2, True]], [[5, 64, 64, 2, False]]],
    },
    "uvdoc": {"backbone_config.out_features": [f"stage{i}" for i in range(1, 7)]},
    "kimi_k25_vision": {"pos_emb_height": 16, "pos_emb_width": 16},
    "janus_vqgan": {"num_patches": 4},
    "instructblipvideo": {"video_token_index": 10},
    "deepseek_ocr2_sam_vision_model": {"downsample_channels": [32, WIDTH]},
    "pp_ocrv6_small_det": {"layer_list_out_channels": [16, 32, 64, 64], "backbone_config.out_features": _STAGES},
    "vibevoice_asr": {"acoustic_tokenizer_chunk_size": 6400},
    "oneformer": {"task_seq_len": TOKENS, "text_encoder_context_length": TOKENS},
    "omdet-turbo": {"apply_layernorm_after_vision_backbone": False, "encoder_in_channels": [32, 48, 192]},
    "align_vision_model": {**_EFFICIENT, "initializer_range": 0.3},  # else all numbers vanish
    "autoformer": {**_SERIES, "moving_average": 3, "label_length": 4},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2},
    "hgnet_v2": {
        "stem_channels": [3, 8, 16],
        "stage_in_channels": [16, 32, 64, 128],
        "stage_mid_channels": [8, 16, 16, 32],
        "stage_out_channels": [32, 64, 128, 256],
        "hidden_sizes": [32, 64, 128, 256],
        "stage_num_blocks": [1, 1, 1, 1],
        "stage_numb_of_layers": [1, 1, 1, 1],
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "llama4_vision_model": {"intermediate_size": 128},
    "neomme": {"head_dim": 32},
    "nemotron3_diarization": _STREAM,
    "nemotron3_5_transcribe_audio": _STREAM,
    "pp_formulanet_vision": {"output_channels": WIDTH, "post_conv_in_channels": WIDTH},
    "sam_hq_vision_model": _SAM,
    "sam_mask_decoder": {"hidden_size": WIDTH},
    "sam_prompt_encoder": _SAM_PROMPT,
    "sam_hq_prompt_encoder": _SAM_PROMPT,
    "sam_vision_model": _SAM,
    "seggpt": {"image_size": [64, 32], "pretrain_image_size": 32, "intermediate_hidden_state_indices": [0, 1], "merge_index": 0},
    "slanext": {"post_conv_in_channels": WIDTH},
    "slanext_vision": {"output_channels": WIDTH, "post_conv_in_channels": WIDTH},
    "vitmatte": {
        "backbone_config.num_channels": 4,
        "backbone_config.patch_size": 16,
        "convstream_hidden_sizes": [8, 16, 24],
        "fusion_hidden_sizes": [32, 16, 8, 8],
    },
    "xmod": {"default_language": "en_XX"},
    "diffusion_gemma_text": {**_GEMMA4, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16},
    "ernie4_5_vl_moe_text": {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default", "mrope_section": [1, 1, 2]}},
    "glm5_next_text": {"index_topk": 16},
    "align": {"projection_dim": 80},
    "d_fine": _HGNET_DETR,
    "deimv2": _HGNET_DETR,
    "mllama_vision_model": {"intermediate_layers_indices": [0, 1], "vision_output_dim": 96},
    "moonshine_streaming": {"num_key_value_heads": 4},
    "pix2struct_text_model": {"initializer_range": 0.02},
    "pp_doclayout_v2": {
        **_HGNET_DETR,
        "class_thresholds": [0.5] * 2,
        "class_order": [0, 1],
        "num_labels": 2,
        "reading_order_config.vocab_size": VOCABULARY,
        "reading_order_config.max_2d_position_embeddings": 1024,
    },
    "pp_doclayout_v3": _HGNET_DETR,
    "pp_doclayout_v4": _HGNET_DETR,
    "blt": {"encoder_hash_byte_group_vocab": 64, "encoder_hash_byte_group_size": [2, 3]},
    "dinov3_convnext": {"hidden_sizes": [8, 16, 32, 64], "depths": [1, 1, 1, 1]},
    "efficientnet": _EFFICIENT,
    "gemma4_text": _GEMMA4,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "informer": {**_SERIES, "label_length": 4},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 2},
    "mimi": _CODEC,
    "mimi_decoder": _CODEC,
    "pocket_tts_audio_tokenizer": _CODEC,
    "pocket_tts_audio_tokenizer_decoder": _CODEC,
    "qwen2_5_omni_bigvgan": {"upsample_initial_channel": 64},
    "rt_detr": _DETR,
    "rt_detr_resnet": _RESNET,
    "rt_detr_v2": _DETR,
    "sam2_hiera_det_model": _HIERA,
    "sam2_vision_model": {**_HIERA_NECK, "fpn_hidden_size": WIDTH},
    "sam2_prompt_encoder": {"image_size": 64, "patch_size": 16, "hidden_size": WIDTH},
    "sam2_video": {"image_size": 64},
    "time_series_transformer": _SERIES,
    "timm_backbone": {"backbone": "test_resnet", "use_pretrained_backbone": False},
    "timm_wrapper": {"architecture": "test_vit", "model_args": None},
    "vibevoice_acoustic_tokenizer": {"num_filters": 2, "depths": [1, 1, 1, 1, 1, 1, 1]},
    "vibevoice_acoustic_tokenizer_decoder": {"num_filters": 2, "depths": [1, 1, 1, 1, 1, 1, 1]},
    "vibevoice_acoustic_tokenizer_encoder": {"num_filters": 2, "depths": [1, 1, 1, 1, 1, 1, 1]},
    "cvt": {"drop_path_rate": [0.0, 0.0, 0.0], "embed_dim": [16, 32, 64], "depth": [1, 2, 3], "num_heads": [1, 2, 2]},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4}},
    "zamba": {"num_hidden_layers": 3, "layers_block_type": ["linear_attention", "hybrid", "hybrid"]},
    "superpoint": {
        "keypoint_decoder_dim": 65,
        "descriptor_decoder_dim": WIDTH,
        "encoder_hidden_sizes": [8, 8, 16, 16],
        "decoder_hidden_size": WIDTH,
        "max_keypoints": 16,
    },
    "xcodec2": {
        "encoder_hidden_size": 4,
        "quantization_dim": 64,
        "num_key_value_heads": 4,
        "semantic_model_config.num_adapter_layers": 0,
    },
    "neucodec": {
        "encoder_hidden_size": 4,
        "quantization_dim": 64,
        "num_key_value_heads": 4,
        "semantic_model_config.num_adapter_layers": 0,
    },
    "encodec": {"num_filters": 4},
    "seamless_m4t": {"upsample_initial_channel": 64},
    "seamless_m4t_v2": {"upsample_initial_channel": 64},
    "vits": {"upsample_initial_channel": 64},
    "tipsv2_dpt": {"neck_hidden_sizes": [8, 16, 32, 32]},
    "superglue": {"hidden_size": WIDTH, "keypoint_encoder_sizes": [8, 16]},
    "qwen4_exp_text": {
        "layer_types": ["linear_attention", "indexed_attention"],
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "fastspeech2_conformer_with_hifigan": {"vocoder_config.model_in_dim": 80},
    "fastspeech2_conformer_hifigan": {"upsample_initial_channel": WIDTH},
    "speecht5_hifigan": {"upsample_initial_channel": WIDTH},
    "fastspeech2_conformer": {"num_mel_bins": 80},
    "dots3_note_text": {"layer_types": ["indexed_attention", "indexed_attention"], "per_layer_config": {}},
    "dots3_note_vision_encoder": {"per_layer_config": {}},
    "edgetam_vision_model": {
        "backbone_config.architecture": "test_convnext",
        "backbone_channel_list": [64, 48, 32, 24],
        "backbone_config.model_args": {"features_only": True, "out_indices": [0, 1, 2, 3]},
        "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
    },
    "zamba2": {"layers_block_type": ["mamba", "hybrid"]},
}
# What `transform` is given, for types that have nothing but an embedding, which is left out by default.
OPTIONS: dict[str, dict[str, Any]] = {"inkling_audio": {"where": "*"}}
# Classes to try before those of the auto mappings.
CLASSES: dict[str, list[str]] = {"musicgen_decoder": ["MusicgenModel"]}
# Types that run only without fused attention.
EAGER: set[str] = set()


def ids(*shape: int, high: int = VOCABULARY) -> torch.Tensor:
    return torch.randint(min(FIRST_ID, high // 2), high, shape or (BATCH, TOKENS))


def _series(config: Any) -> dict[str, Any]:
    past, features = config.context_length + max(config.lags_sequence), config.num_time_features
    return {
        "past_values": torch.rand(BATCH, past),
        "past_time_features": torch.randn(BATCH, past, features),
        "past_observed_mask": torch.ones(BATCH, past),
        "future_values": torch.rand(BATCH, config.prediction_length),
        "future_time_features": torch.randn(BATCH, config.prediction_length, features),
    }


def _window(config: Any) -> dict[str, Any]:
    return {"past_values": torch.randn(BATCH, config.context_length, config.num_input_channels)}


def _codes(config: Any) -> dict[str, Any]:
    return {"input_ids": torch.randint(0, 16, (BATCH * config.num_codebooks, TOKENS))}


def _music(config: Any) -> dict[str, Any]:
    books = config.decoder.num_codebooks
    return {"input_ids": ids(), "decoder_input_ids": torch.randint(0, 16, (BATCH * books, 6))}


def _dia(config: Any) -> dict[str, Any]:
    return {"input_ids": ids(), "decoder_input_ids": torch.randint(0, 16, (BATCH, 6, config.decoder_config.num_channels))}


def _decisions(config: Any) -> dict[str, Any]:
    return {
        "states": torch.randn(BATCH, 5, config.state_dim), "actions": torch.randn(BATCH, 5, config.act_dim),
        "rewards": torch.randn(BATCH, 5, 1), "returns_to_go": torch.randn(BATCH, 5, 1),
        "timesteps": torch.arange(5).repeat(BATCH, 1), "attention_mask": torch.ones(BATCH, 5),
    }  # fmt: skip


def _lxmert(config: Any) -> dict[str, Any]:
    regions = torch.randn(BATCH, 4, config.visual_feat_dim), torch.rand(BATCH, 4, config.visual_pos_dim)
    return {"input_ids": ids(), "visual_feats": regions[0], "visual_pos": regions[1]}


def _flat_patches(config: Any) -> dict[str, Any]:
    vision = getattr(config, "vision_config", config)
    width = 2 + vision.patch_embed_hidden_size if hasattr(vision, "patch_embed_hidden_size") else 2 + vision.patch_size**2 * 3
    places = torch.stack([torch.arange(9) // 3, torch.arange(9) % 3], -1).float() + 1
    patches = torch.cat([places.expand(BATCH, 9, 2), torch.randn(BATCH, 9, width - 2)], -1)
    extra = {"decoder_input_ids": ids(BATCH, 6)} if vision is not config else {}
    return {"flattened_patches": patches, **extra}


def _tiles(config: Any) -> dict[str, Any]:
    size, tiles = config.image_size, config.max_num_tiles
    pixels = torch.randn(BATCH, 1, tiles, 3, size, size)
    ones = torch.ones(BATCH, 1, dtype=torch.long)
    return {"pixel_values": pixels, "aspect_ratio_ids": ones, "aspect_ratio_mask": ones[..., None].repeat(1, 1, tiles)}


def _channels(config: Any) -> dict[str, Any]:
    return {"latents": torch.randn(BATCH, config.hidden_size, TOKENS)}


def _mels(config: Any) -> dict[str, Any]:
    return {"mel_spectrogram": torch.randn(BATCH, config.mel_dim, TOKENS)}


def _books(config: Any) -> dict[str, Any]:
    return {"input_ids": torch.randint(0, 16, (BATCH, TOKENS, config.num_codebooks + 1))}


def _pictures(config: Any) -> dict[str, Any]:
    height = config.image_size[0] // 2
    return {
        name: torch.randn(BATCH, 3, height, config.image_size[1])
        for name in ("pixel_values", "prompt_pixel_values", "prompt_masks")
    }


def _past(config: Any) -> dict[str, Any]:
    return {
        "past_values": torch.randn(BATCH, config.context_length),
        "past_values_padding": torch.zeros(BATCH, config.context_length, dtype=torch.long),
        "freq": torch.zeros(BATCH, 1, dtype=torch.long),
    }


def _interleaved(config: Any) -> dict[str, Any]:
    size = config.vision_config.image_size
    return {
        "input_ids": ids(), "attention_mask": torch.ones(BATCH, TOKENS, dtype=torch.long),
        "pixel_values": torch.randn(BATCH, 1, 3, size, size), "image_attention_mask": torch.ones(BATCH, TOKENS, 1),
    }  # fmt: skip


def _grounded(config: Any) -> dict[str, Any]:
    size, places = config.vision_config.image_size, torch.zeros(BATCH, TOKENS, dtype=torch.long)
    places[:, : config.latent_query_num] = 1
    return {"pixel_values": torch.randn(BATCH, 3, size, size), "input_ids": ids(), "image_embeds_position_mask": places}


def _speech(config: Any) -> dict[str, Any]:
    return {"input_values": torch.randn(BATCH, 4000), "decoder_input_ids": ids(BATCH, 6)}


def _squares(config: Any) -> dict[str, Any]:
    size = config.patch_size
    return {"pixel_values": torch.randn(32, 3, size, size), "grid_thw": torch.tensor([[1, 4, 4]] * BATCH)}


def _lengths(name: str) -> Callable[[Any], dict[str, Any]]:
    def make(config: Any) -> dict[str, Any]:
        return {"input_features": torch.randn(config.num_mel_bins, 64), name: torch.tensor([32, 32])}

    return make


def _conformed(config: Any) -> dict[str, Any]:
    width = getattr(config, "input_size", None) or getattr(config, "input_dim", 80)
    masks = torch.ones(BATCH, 32, dtype=torch.long)
    return {"input_features": torch.randn(BATCH, 32, width), "input_features_mask": masks}


def _embeds(*names: str, width: str = "hidden_size") -> Callable[[Any], dict[str, Any]]:
    return lambda config: {name: torch.randn(BATCH, TOKENS, getattr(config, width)) for name in names}


def _sized(config: Any) -> dict[str, Any]:
    size = config.patch_size
    return {"pixel_values": torch.randn(1, 3, size, BATCH * 16 * size), "target_sizes": torch.tensor([[4, 4]] * BATCH)}


def _cameras(config: Any) -> dict[str, Any]:
    size, vlm = config.vlm_config.vision_config.image_size, config.vlm_config
    patches = (size // vlm.vision_config.patch_size) ** 2
    images = torch.full((BATCH, patches), vlm.image_token_id)
    tokens = torch.cat([images, ids(BATCH, 4, high=vlm.text_config.vocab_size)], 1)
    return {
        "action_embeds": torch.randn(BATCH, 4, config.dit_config.hidden_size), "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens), "pixel_values": torch.randn(BATCH, 1, 3, size, size),
        "pixel_attention_mask": torch.ones(BATCH, 1, dtype=torch.bool),
    }  # fmt: skip


def _denoising(config: Any) -> dict[str, Any]:
    mels = torch.randn(BATCH, TOKENS, config.mel_dim)
    return {
        "hidden_states": mels, "condition_vector": torch.randn(BATCH, TOKENS, config.mel_dim),
        "speaker_embedding": torch.randn(BATCH, TOKENS, config.enc_emb_dim), "time_step": torch.rand(BATCH),
        "quantized_code": torch.randint(0, 16, (BATCH, TOKENS // config.repeats)), "apply_cfg": False,
    }  # fmt: skip


def _mask_decoder(config: Any) -> dict[str, Any]:
    width, sizes = config.hidden_size, (16, 8, 4)
    return {
        "decoder_queries": torch.randn(BATCH, 4, width), "encoder_hidden_states": torch.randn(BATCH, 16, width),
        "backbone_features": [torch.randn(BATCH, width, size, size) for size in sizes],
        "prompt_features": torch.randn(BATCH, 3, width),
    }  # fmt: skip


def _levels(config: Any) -> dict[str, Any]:
    width = config.hidden_size
    return {
        "vision_features": [torch.randn(BATCH, width, 4, 4)], "vision_pos_embeds": [torch.randn(BATCH, width, 4, 4)],
        "text_features": torch.randn(BATCH, 5, width), "text_mask": torch.ones(BATCH, 5, dtype=torch.bool),
    }  # fmt: skip


def _retrieved(config: Any) -> dict[str, Any]:
    return {
        "input_ids": ids(), "attention_mask": torch.ones(BATCH, TOKENS, dtype=torch.long), "n_docs": 2,
        "context_input_ids": ids(BATCH * 2, TOKENS), "context_attention_mask": torch.ones(BATCH * 2, TOKENS, dtype=torch.long),
        "doc_scores": torch.randn(BATCH, 2), "decoder_input_ids": ids(BATCH, 6),
    }  # fmt: skip


def _classes(config: Any) -> dict[str, Any]:
    return {
        "pixel_values": torch.randn(BATCH, 3, 64, 64), "classes_input_ids": ids(3 * BATCH, 4),
        "classes_attention_mask": torch.ones(3 * BATCH, 4, dtype=torch.long), "tasks_input_ids": ids(BATCH, 4),
        "tasks_attention_mask": torch.ones(BATCH, 4, dtype=torch.long), "classes_structure": torch.tensor([3] * BATCH),
    }  # fmt: skip


def _times(config: Any) -> dict[str, Any]:
    pixels = torch.randn(BATCH * 16, config.patch_temporal * config.patch_size**2 * 3)
    return {"pixel_values": pixels, "grid_thw": torch.tensor([[1, 4, 4]] * BATCH)}


def _waves(config: Any) -> dict[str, Any]:
    width = config.semantic_model_config.feature_projection_input_dim
    return {"input_values": torch.randn(BATCH, 1, 6400), "input_features": torch.randn(BATCH, 20, width)}


def _choices(config: Any) -> dict[str, Any]:
    return {
        "input_ids": ids(1, TOKENS), "marks": torch.tensor([[5, 9]]), "num_options": torch.tensor([[2, 2]]),
        "question_type_ids": torch.tensor([[0, 0]]),
    }  # fmt: skip


# Inputs from the model's config.
INPUTS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "blt_local_decoder": _embeds("inputs_embeds", "patch_embeds"),
    "dia_decoder": lambda config: {
        "input_ids": torch.randint(0, 16, (BATCH, 6, config.num_channels)),
        "encoder_hidden_states": torch.randn(BATCH, TOKENS, config.cross_hidden_size),
    },
    "deepseek_ocr2_encoder": lambda config: {"inputs_embeds": torch.randn(BATCH, TOKENS, config.hidden_size), "num_patches": 6},
    "gemma4_vision": lambda config: {
        "pixel_values": torch.rand(BATCH, 36, 3 * config.patch_size**2),
        "pixel_position_ids": torch.cartesian_prod(torch.arange(6), torch.arange(6)).expand(BATCH, 36, 2),
    },
    "granite_speech5_encoder": lambda config: {"input_features": torch.randn(BATCH, 32, config.num_mel_bins * 4)},
    "granite_speech5_ctc": lambda config: {"input_features": torch.randn(BATCH, 32, config.encoder_config.num_mel_bins * 4)},
    "inkling2_vision": lambda config: {
        "pixel_values": torch.randn(BATCH * 4, *[config.patch_size * config.spatial_merge_size] * 2, config.num_channels),
        "image_grid_thw": torch.tensor([[1, 2, 2]] * BATCH),
    },
    "inkling_audio": lambda config: {"audio_input_ids": torch.randint(0, config.codebook_size, (BATCH, 6, config.num_codebooks))},
    "inkling_vision": lambda config: {
        "pixel_values": torch.randn(BATCH, config.temporal_patch_size, config.patch_size, config.patch_size, config.num_channels)
    },
    "pi0": _cameras,
    "xcodec2": _waves,
    "neucodec": _waves,
    "superglue": lambda config: {"pixel_values": torch.randn(BATCH, 2, 3, 64, 64)},
    "voxtral_realtime_text": lambda config: {"input_ids": ids(), "t_cond": torch.randn(BATCH, 1, config.hidden_size)},
    "voxtral_realtime": lambda config: {"input_ids": ids(), "input_features": torch.randn(BATCH, 128, 96)},
    "blt_local_encoder": lambda config: {
        "input_ids": ids(),
        "num_patches": 3,
        "patch_ids": torch.arange(3).repeat_interleave(4).expand(BATCH, TOKENS),
        "patch_embeds": None,
    },
    "instructblipvideo": lambda config: {
        "pixel_values": torch.randn(BATCH, 2, 3, 32, 32),
        "qformer_input_ids": ids(BATCH, 5),
        "input_ids": torch.cat([torch.full((BATCH, 2 * config.num_query_tokens), 10), ids(BATCH, 4)], 1),
    },
    "jev": _choices,
    "rag": _retrieved,
    "omdet-turbo": _classes,
    "phi4_multimodal_audio": lambda config: {
        "hidden_states": torch.randn(BATCH, 64, config.input_size),
        "mask": torch.ones(BATCH, 64, dtype=torch.bool),
    },
    "qwen2_5_omni_dit": _denoising,
    "qwen2_5_omni_token2wav": lambda config: {
        "code": torch.randint(0, 16, (1, 6)),
        "conditioning": torch.randn(1, config.dit_config.enc_emb_dim),
        "reference_mel": torch.randn(1, TOKENS, config.dit_config.mel_dim),
        "num_steps": 2,
    },
    "qwen3_omni_moe_talker_code_predictor": _embeds("inputs_embeds"),
    "qwen3_omni_moe_talker_text": _embeds("inputs_embeds"),
    "qwen3_asr_encoder": lambda config: {
        "input_features": torch.randn(BATCH, config.num_mel_bins, 100),
        "input_features_mask": torch.ones(BATCH, 100, dtype=torch.long),
    },
    "sam3_detr_encoder": _levels,
    "sam3_lite_text_detr_encoder": _levels,
    "sam3_lite_text_mask_decoder": _mask_decoder,
    "sam3_mask_decoder": _mask_decoder,
    "tvp": lambda config: {  # one video: it does not repeat its places over several
        "input_ids": ids(1, TOKENS),
        "attention_mask": torch.ones(1, TOKENS, dtype=torch.long),
        "pixel_values": torch.randn(1, config.num_frames, 3, 64, 64),
    },
    "unlimited_ocr_vision_encoder": lambda config: {"patch_embeds": torch.randn(BATCH, config.hidden_size, 4, 4)},
    "vibevoice_acoustic_tokenizer_decoder": lambda config: {"hidden_states": torch.randn(BATCH, config.hidden_size, 6)},
    "vibevoice_acoustic_tokenizer_encoder": lambda config: {"hidden_states": torch.randn(BATCH, 1, 6400)},
    "video_llama_3_vision": lambda config: {
        "pixel_values": torch.randn(BATCH * 16, 3 * config.patch_size**2),
        "grid_thw": torch.tensor([[1, 4, 4]] * BATCH),
        "merge_sizes": torch.tensor([2] * BATCH),
    },
    "vitmatte": lambda config: {"pixel_values": torch.randn(BATCH, 4, 64, 64)},
    "xclip_vision_model": lambda config: {"pixel_values": torch.randn(config.num_frames, 3, 32, 32)},
    "kosmos_2_5_vision_model": lambda config: {
        "hidden_states": torch.randn(BATCH, TOKENS, config.hidden_size),
        "attention_mask": torch.ones(BATCH, TOKENS),
    },
    "minicpm_ocr_vision": _sized,
    "minicpmv4_6_vision": _sized,
    "minicpmv4_7_vision": _sized,
    "molmo2_adapter": lambda config: {
        "image_features": torch.randn(BATCH, 16, config.hidden_size * len(config.vision_feature_layer)),
        "pooled_patches_idx": torch.randint(0, 32, (8, 4)),
    },
    "molmo2_vision": lambda config: {
        "pixel_values": torch.randn(BATCH, config.num_position_embeddings, 3 * config.patch_size**2)
    },
    "moshi_depth": lambda config: {
        "input_ids": ids(BATCH, 4, high=16),
        "last_hidden_state": torch.randn(BATCH, 1, config.input_size),
    },
    "muse_glimmer_assistant": lambda config: {
        "noise_embeds": torch.randn(BATCH, 4, config.hidden_size),
        "context_hidden_states": torch.randn(BATCH, 6, config.hidden_size * len(config.target_layer_ids)),
    },
    "muse_glimmer_vision": _times,
    "muse_spark_vision": _times,
    "muse_spark_audio": lambda config: {"input_values": torch.randn(BATCH, 9600)},
    "dots3_note_audio_encoder": lambda config: {
        "input_features": torch.randn(BATCH, config.feature_size, 32),
        "chunk_sample_lengths": torch.tensor([32 * config.hop_length] * BATCH),
    },
    "autoformer": _series,
    "decision_transformer": _decisions,
    "dia": _dia,
    "informer": _series,
    "lxmert": _lxmert,
    "florence_vision": lambda config: {"hidden_states": torch.randn(BATCH, 3, 64, 64)},
    "fun_asr_nano_encoder": _conformed,
    "gemma3n_audio": lambda config: {
        "audio_mel": torch.randn(BATCH, 32, config.input_feat_size),
        "audio_mel_mask": torch.zeros(BATCH, 32, dtype=torch.bool),
    },
    "idefics": _interleaved,
    "kimi_k25_vision": _squares,
    "kosmos-2": _grounded,
    "paddleocr_vl_vision": lambda config: {
        "pixel_values": torch.randn(1, 32, 3, config.patch_size, config.patch_size),
        "grid_thw": torch.tensor([[1, 4, 4]] * BATCH),
    },
    "qwen2_5_omni_audio_encoder": _lengths("feature_lens"),
    "qwen3_omni_moe_audio_encoder": _lengths("feature_lens"),
    "seggpt": _pictures,
    "speech-encoder-decoder": _speech,
    "timesfm": _past,
    "kyutai_speech_to_text": _books,
    "mimi": lambda config: {"input_values": torch.randn(BATCH, 1, 4000)},
    "mimi_decoder": _channels,
    "mllama_vision_model": _tiles,
    "musicgen": _music,
    "musicgen_decoder": _codes,
    "musicgen_melody": _music,
    "musicgen_melody_decoder": _codes,
    "patchtsmixer": _window,
    "patchtst": _window,
    "pix2struct": _flat_patches,
    "pix2struct_vision_model": _flat_patches,
    "pocket_tts_audio_tokenizer_decoder": _channels,
    "qwen2_5_omni_bigvgan": _mels,
    "time_series_transformer": _series,
}
