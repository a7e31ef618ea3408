"""What transformers 5 calls the classes of its models: layers, attentions, FFNs, and what loops over the layers."""

from __future__ import annotations

MODELS = "transformers.models."
Names = dict[str, tuple[str, ...]]

# The classes of each library module, as named there: layer, attention, FFN, and what loops over the layers. Their code
# is the same within a group (compared by syntax tree in transformers 5.23).
VIT_LIKE: Names = {
    "audio_spectrogram_transformer": ("ASTLayer", "ASTAttention", "ASTMLP", "ASTModel"),
    "deit": ("DeiTLayer", "DeiTAttention", "DeiTMLP", "DeiTModel"),
    "ijepa": ("IJepaLayer", "IJepaAttention", "IJepaMLP", "IJepaModel"),
    "vit": ("ViTLayer", "ViTAttention", "ViTMLP", "ViTModel"),
    "vit_mae": ("ViTMAELayer", "ViTMAEAttention", "ViTMAEMLP", "ViTMAEModel"),
    "vit_msn": ("ViTMSNLayer", "ViTMSNAttention", "ViTMSNMLP", "ViTMSNModel"),
    "vivit": ("VivitLayer", "VivitAttention", "VivitMLP", "VivitModel"),
}
DINO_LIKE: Names = {
    "dinov2": ("Dinov2Layer", "Dinov2Attention", "Dinov2MLP", "Dinov2Encoder"),
    "dinov2_with_registers": (
        *("Dinov2WithRegistersLayer", "Dinov2WithRegistersAttention"),
        *("Dinov2WithRegistersMLP", "Dinov2WithRegistersEncoder"),
    ),
}
CLIP_LIKE: Names = {
    "altclip": ("AltCLIPEncoderLayer", "AltCLIPAttention", "AltCLIPMLP", "AltCLIPEncoder"),
    "chinese_clip": (
        *("ChineseCLIPVisionLayer", "ChineseCLIPVisionAttention"),
        *("ChineseCLIPVisionMLP", "ChineseCLIPVisionEncoder"),
    ),
    "clip": ("CLIPEncoderLayer", "CLIPAttention", "CLIPMLP", "CLIPEncoder"),
    "clipseg": ("CLIPSegEncoderLayer", "CLIPSegAttention", "CLIPSegMLP", ""),  # its encoder returns what lies between
    "idefics2": ("Idefics2EncoderLayer", "Idefics2VisionAttention", "Idefics2VisionMLP", "Idefics2Encoder"),
    "idefics3": ("Idefics3EncoderLayer", "Idefics3VisionAttention", "Idefics3VisionMLP", "Idefics3Encoder"),
    "kosmos2": ("Kosmos2VisionEncoderLayer", "Kosmos2VisionAttention", "Kosmos2VisionMLP", "Kosmos2VisionEncoder"),
    "metaclip_2": ("MetaClip2EncoderLayer", "MetaClip2Attention", "MetaClip2MLP", "MetaClip2Encoder"),
    "owlv2": ("Owlv2EncoderLayer", "Owlv2Attention", "Owlv2MLP", "Owlv2Encoder"),
    "owlvit": ("OwlViTEncoderLayer", "OwlViTAttention", "OwlViTMLP", "OwlViTEncoder"),
    "siglip": ("SiglipEncoderLayer", "SiglipAttention", "SiglipMLP", "SiglipEncoder"),
    "siglip2": ("Siglip2EncoderLayer", "Siglip2Attention", "Siglip2MLP", "Siglip2Encoder"),
    "smolvlm": ("SmolVLMEncoderLayer", "SmolVLMVisionAttention", "SmolVLMVisionMLP", "SmolVLMEncoder"),
    "x_clip": ("XCLIPEncoderLayer", "XCLIPAttention", "XCLIPMLP", "XCLIPEncoder"),
}
GIT_LIKE: Names = {"git": ("GitVisionEncoderLayer", "GitVisionAttention", "GitVisionMLP", "GitVisionEncoder")}
RF_DETR_LIKE: Names = {"rf_detr": ("RfDetrDinov2Layer", "RfDetrDinov2Attention", "RfDetrDinov2MLP", "")}
BEIT_LIKE: Names = {"beit": ("BeitLayer", "BeitAttention", "BeitMLP", "BeitModel")}
BLIP_LIKE: Names = {"blip": ("BlipEncoderLayer", "BlipAttention", "BlipMLP", "BlipEncoder")}
BLIP2_LIKE: Names = {
    "blip_2": ("Blip2EncoderLayer", "Blip2Attention", "Blip2MLP", "Blip2Encoder"),
    "instructblip": ("InstructBlipEncoderLayer", "InstructBlipAttention", "InstructBlipMLP", "InstructBlipEncoder"),
    "instructblipvideo": (
        *("InstructBlipVideoEncoderLayer", "InstructBlipVideoAttention"),
        *("InstructBlipVideoMLP", "InstructBlipVideoEncoder"),
    ),
}
SWIN_LIKE: Names = {"swin": ("SwinLayer", "SwinAttention", "SwinMLP", "SwinStage")}
# the same code as DINOv2's with attention as CLIP's
EOMT_LIKE: Names = {
    "eomt": ("EomtLayer", "EomtAttention", "EomtMLP", ""),
    "videomt": ("VideomtLayer", "VideomtAttention", "VideomtMLP", ""),
}
TEXT_LIKE: Names = {"tipsv2": ("Tipsv2TextEncoderLayer", "Tipsv2TextAttention", "Tipsv2MLP", "Tipsv2TextEncoder")}
TIPS_LIKE: Names = {  # DINOv2's with patch embeddings of their own
    "radio": ("RadioLayer", "RadioAttention", "RadioMLP", "RadioEncoder"),
    "tipsv2": ("Tipsv2VisionLayer", "Tipsv2VisionAttention", "Tipsv2VisionMLP", "Tipsv2VisionEncoder"),
}
PIXIO_LIKE: Names = {"pixio": ("PixioLayer", "PixioAttention", "PixioMLP", "PixioModel")}
INTERNVL_LIKE: Names = {
    "internvl": ("InternVLVisionLayer", "InternVLVisionAttention", "InternVLVisionMLP", "InternVLVisionEncoder")
}
JANUS_LIKE: Names = {
    "janus": ("JanusVisionEncoderLayer", "JanusVisionAttention", "JanusVisionMLP", "JanusVisionEncoder")
}
LW_DETR_LIKE: Names = {"lw_detr": ("LwDetrViTLayer", "LwDetrViTAttention", "LwDetrViTMlp", "")}

# attention with more to it than any operator has; their FFNs fuse, each under the names that its library gives
FC, ACT, LINEAR = ("fc1", "activation_fn", "fc2"), ("fc1", "act", "fc2"), ("linear_fc1", "act_fn", "linear_fc2")
ONLY_FFN = {
    "cohere_compass.modeling_cohere_compass.CohereCompassVisionMLP": LINEAR,
    "ernie4_5_vl_moe.modeling_ernie4_5_vl_moe.Ernie4_5VLVisionMLP": ACT,
    "dinov3_vit.modeling_dinov3_vit.DINOv3ViTMLP": ("up_proj", "act_fn", "down_proj"),
    "eomt_dinov3.modeling_eomt_dinov3.EomtDinov3MLP": ("up_proj", "act_fn", "down_proj"),
    "florence2.modeling_florence2.Florence2VisionMLP": FC,
    "focalnet.modeling_focalnet.FocalNetMlp": ("fc1", "activation", "fc2"),
    "groupvit.modeling_groupvit.GroupViTMLP": FC,
    "hiera.modeling_hiera.HieraMlp": FC,
    "llama4.modeling_llama4.Llama4VisionMLP": FC,
    "mgp_str.modeling_mgp_str.MgpstrMlp": ACT,
    "minicpm_ocr.modeling_minicpm_ocr.MiniCPMOcrVisionMLP": FC,
    "minicpmv4_6.modeling_minicpmv4_6.MiniCPMV4_6VisionMLP": FC,
    "minicpmv4_7.modeling_minicpmv4_7.MiniCPMV4_7VisionMLP": FC,
    "mlcd.modeling_mlcd.MLCDMLP": FC,
    "mllama.modeling_mllama.MllamaVisionMLP": FC,
    "molmo2.modeling_molmo2.Molmo2VisionMLP": FC,
    "paddleocr_vl.modeling_paddleocr_vl.PaddleOCRVisionMLP": FC,
    "phi4_multimodal.modeling_phi4_multimodal.Phi4MultimodalVisionMLP": FC,
    "pvt.modeling_pvt.PvtFFN": ("dense1", "intermediate_act_fn", "dense2"),
    "qwen2_vl.modeling_qwen2_vl.VisionMlp": ACT,
    "qwen3_5.modeling_qwen3_5.Qwen3_5VisionMLP": LINEAR,
    "qwen3_5_moe.modeling_qwen3_5_moe.Qwen3_5MoeVisionMLP": LINEAR,
    "qwen3_omni_moe.modeling_qwen3_omni_moe.Qwen3OmniMoeVisionMLP": LINEAR,
    "qwen3_vl.modeling_qwen3_vl.Qwen3VLVisionMLP": LINEAR,
    "qwen3_vl_moe.modeling_qwen3_vl_moe.Qwen3VLMoeVisionMLP": LINEAR,
    "qwen4_exp.modeling_qwen4_exp.Qwen4ExpVisionMLP": LINEAR,
    "sam.modeling_sam.SamMLPBlock": ("lin1", "act", "lin2"),
    "sam3.modeling_sam3.Sam3MLP": FC,
    "sam_hq.modeling_sam_hq.SamHQMLPBlock": ("lin1", "act", "lin2"),
    "sapiens2.modeling_sapiens2.Sapiens2MLP": ("up_proj", "act_fn", "down_proj"),
    "seggpt.modeling_seggpt.SegGptMlp": ("lin1", "act", "lin2"),
    "video_llama_3.modeling_video_llama_3.VideoLlama3VisionMLP": FC,
    "videoprism.modeling_videoprism.VideoPrismMLP": FC,
    "vitdet.modeling_vitdet.VitDetMlp": ACT,
    "vjepa2.modeling_vjepa2.VJEPA2MLP": ("fc1", "activation", "fc2"),
}
# gated FFNs of gate_proj, act_fn, up_proj and down_proj (their forwards are the same text in 5.24)
GATED_MLPS = (
    "aimv2.modeling_aimv2.Aimv2MLP",
    "deepseek_ocr2.modeling_deepseek_ocr2.DeepseekOcr2VisionMLP",
    "dinov2.modeling_dinov2.Dinov2SwiGLUFFN",
    "dinov2_with_registers.modeling_dinov2_with_registers.Dinov2WithRegistersSwiGLUFFN",
    "dinov3_vit.modeling_dinov3_vit.DINOv3ViTGatedMLP",
    "dots3_note.modeling_dots3_note.Dots3NoteVisionMLP",
    "eomt.modeling_eomt.EomtSwiGLUFFN",
    "eomt_dinov3.modeling_eomt_dinov3.EomtDinov3GatedMLP",
    "glm4v.modeling_glm4v.Glm4VisionMlp",
    "glm4v_moe.modeling_glm4v_moe.Glm4vMoeisionMlp",
    "glm_ocr.modeling_glm_ocr.GlmOcrVisionMlp",
    "ovis2.modeling_ovis2.Ovis2MLP",
    "pixtral.modeling_pixtral.PixtralMLP",
    "qwen2_5_omni.modeling_qwen2_5_omni.Qwen2_5OmniMLP",
    "qwen2_5_vl.modeling_qwen2_5_vl.Qwen2_5_VLMLP",
    "radio.modeling_radio.RadioSwiGLUFFN",
    "rf_detr.modeling_rf_detr.RfDetrDinov2SwiGLUFFN",
    "sapiens2.modeling_sapiens2.Sapiens2GatedMLP",
    "tipsv2.modeling_tipsv2.Tipsv2VisionSwiGLUFFN",
    "videomt.modeling_videomt.VideomtSwiGLUFFN",
)
RMS_NORMS = (
    "aimv2.modeling_aimv2.Aimv2RMSNorm",
    "dots3_note.modeling_dots3_note.Dots3NoteRMSNorm",
    "glm4v.modeling_glm4v.Glm4vRMSNorm",
    "glm4v_moe.modeling_glm4v_moe.Glm4vMoeRMSNorm",
    "glm5_next.modeling_glm5_next.Glm5NextRMSNorm",
    "glm_ocr.modeling_glm_ocr.GlmOcrRMSNorm",
    "ovis2.modeling_ovis2.Ovis2RMSNorm",
    "pixtral.modeling_pixtral.PixtralRMSNorm",
    "qwen2_5_omni.modeling_qwen2_5_omni.Qwen2_5OmniRMSNorm",
    "qwen2_5_vl.modeling_qwen2_5_vl.Qwen2_5_VLRMSNorm",
    "sapiens2.modeling_sapiens2.Sapiens2RMSNorm",
)
DINO3_LIKE: Names = {
    "dinov3_vit": ("DINOv3ViTLayer", "DINOv3ViTAttention", "DINOv3ViTMLP", "DINOv3ViTEncoder"),
    "eomt_dinov3": ("EomtDinov3Layer", "EomtDinov3Attention", "EomtDinov3MLP", ""),
}
AIM_LIKE: Names = {
    "aimv2": ("Aimv2EncoderLayer", "Aimv2Attention", "Aimv2MLP", "Aimv2Encoder"),
    "ovis2": ("Ovis2VisionEncoderLayer", "Ovis2VisionAttention", "Ovis2MLP", "Ovis2VisionEncoder"),
}
SAPIENS2_LIKE: Names = {"sapiens2": ("Sapiens2Layer", "Sapiens2Attention", "", "Sapiens2Encoder")}
MLCD_LIKE: Names = {"mlcd": ("MLCDEncoderLayer", "MLCDAttention", "MLCDMLP", "MLCDEncoder")}
PIXTRAL_LIKE: Names = {"pixtral": ("PixtralAttentionLayer", "PixtralAttention", "PixtralMLP", "PixtralTransformer")}
LLAMA4_LIKE: Names = {  # its encoder returns what lies between
    "llama4": ("Llama4VisionEncoderLayer", "Llama4VisionAttention", "Llama4VisionMLP", "")
}
SAM3_LIKE: Names = {"sam3": ("", "Sam3ViTRoPEAttention", "Sam3MLP", "")}
PHI4_LIKE: Names = {
    "phi4_multimodal": (
        *("Phi4MultimodalVisionEncoderLayer", "Phi4MultimodalVisionAttention"),
        *("Phi4MultimodalVisionMLP", ""),  # masked in every call
    )
}
VJEPA2_LIKE: Names = {"vjepa2": ("VJEPA2Layer", "VJEPA2RopeAttention", "VJEPA2MLP", "VJEPA2Encoder")}
# blocks of images of many sizes in one sequence; no encoder where its blocks are told of different sequences, or where
# it looks at what lies between
PACKED_LIKE: Names = {
    "cohere_compass": ("CohereCompassVisionBlock", "CohereCompassVisionAttention", "", ""),
    "dots3_note": ("Dots3NoteVisionBlock", "Dots3NoteVisionAttention", "", "Dots3NoteVisionModel"),
    "ernie4_5_vl_moe": (
        *("Ernie4_5_VLMoeVisionBlock", "Ernie4_5_VLMoeVisionAttention"),
        *("", "Ernie4_5_VLMoeVisionTransformerPretrainedModel"),
    ),
    "glm4v": ("Glm4vVisionBlock", "Glm4vVisionAttention", "", "Glm4vVisionModel"),
    "glm4v_moe": ("Glm4vMoeVisionBlock", "Glm4vMoeVisionAttention", "", "Glm4vMoeVisionModel"),
    "glm5_next": ("Glm5NextVisionBlock", "Glm5NextVisionAttention", "", "Glm5NextVisionModel"),
    "glm_ocr": ("GlmOcrVisionBlock", "GlmOcrVisionAttention", "", "GlmOcrVisionModel"),
    "qwen2_5_vl": ("Qwen2_5_VLVisionBlock", "Qwen2_5_VLVisionAttention", "", ""),
    "qwen2_vl": ("Qwen2VLVisionBlock", "VisionAttention", "", "Qwen2VisionTransformerPretrainedModel"),
    "qwen3_5": ("Qwen3_5VisionBlock", "Qwen3_5VisionAttention", "", "Qwen3_5VisionModel"),
    "qwen3_5_moe": ("Qwen3_5MoeVisionBlock", "Qwen3_5MoeVisionAttention", "", "Qwen3_5MoeVisionModel"),
    "qwen3_omni_moe": ("Qwen3OmniMoeVisionBlock", "Qwen3OmniMoeVisionAttention", "", ""),
    "qwen3_vl": ("Qwen3VLVisionBlock", "Qwen3VLVisionAttention", "", ""),
    "qwen3_vl_moe": ("Qwen3VLMoeVisionBlock", "Qwen3VLMoeVisionAttention", "", ""),
    "qwen4_exp": ("Qwen4ExpVisionBlock", "Qwen4ExpVisionAttention", "", "Qwen4ExpVisionModel"),
}
OMNI_LIKE: Names = {"qwen2_5_omni": ("Qwen2_5OmniVisionBlock", "Qwen2_5OmniVisionAttention", "", "")}
KIMI_LIKE: Names = {
    "kimi_k25": ("Kimi_K25VisionEncoderLayer", "Kimi_K25VisionAttention", "Kimi_K25VisionMLP", "Kimi_K25VisionModel"),
    "muse_glimmer": ("MuseGlimmerVisionEncoderLayer", "MuseGlimmerVisionAttention", "MuseGlimmerVisionMLP", ""),
    "muse_spark": ("MuseSparkVisionEncoderLayer", "MuseSparkVisionAttention", "MuseSparkVisionMLP", ""),
}
VIDEO_LLAMA_LIKE: Names = {
    "paddleocr_vl": ("PaddleOCRVisionEncoderLayer", "PaddleOCRVisionAttention", "", "PaddleOCRVisionEncoder"),
    "video_llama_3": ("VideoLlama3VisionEncoderLayer", "VideoLlama3VisionAttention", "", "VideoLlama3VisionEncoder"),
}
# layers whose FFN is spread over modules, or stands in the layer itself
APART = ("intermediate.dense", "intermediate.intermediate_act_fn", "output.dense")
FFNS_APART = {
    "convnext.modeling_convnext.ConvNextLayer": ("pwconv1", "act", "pwconv2"),
    "data2vec.modeling_data2vec_vision.Data2VecVisionLayer": APART,
    "swin2sr.modeling_swin2sr.Swin2SRLayer": APART,
    "swinv2.modeling_swinv2.Swinv2Layer": APART,
    "timesformer.modeling_timesformer.TimesformerLayer": APART,
}

TURNED = "rotary position embeddings turn q and k in between"
RELATIVE = "relative position biases depend on q"
COSINE = "cosine attention normalises q and k in between"
GATED = "a gated FFN of parts that its rule does not know"
POOLED = "its queries are pooled"
REDUCED = "its keys and values are those of a smaller map"
CROSS = "cross-attention: its keys and values are not the tokens"
REFUSED = {
    "convnextv2.modeling_convnextv2.ConvNextV2Layer": "a response normalisation stands in its FFN",
    "cvt.modeling_cvt.CvtSelfAttention": "convolutions make its queries, keys and values",
    "florence2.modeling_florence2.Florence2VisionChannelAttention": "it attends between channels, not tokens",
    "florence2.modeling_florence2.Florence2VisionWindowAttention": "its windows are cut and padded behind the norm",
    "focalnet.modeling_focalnet.FocalNetModulation": "focal modulation is no attention",
    "glpn.modeling_glpn.GLPNEfficientSelfAttention": REDUCED,
    "groupvit.modeling_groupvit.GroupViTAssignAttention": CROSS,
    "groupvit.modeling_groupvit.GroupViTMixerMLP": "it mixes tokens, not channels",
    "hiera.modeling_hiera.HieraMaskUnitAttention": "its queries are pooled, and it attends within mask units",
    "llama4.modeling_llama4.Llama4VisionMLP2": "a GELU follows its second projection, which gives another width",
    "mgp_str.modeling_mgp_str.MgpstrAttention": "it always returns its attention maps",
    "mobilevit.modeling_mobilevit.MobileViTSelfAttention": "its layer has SiLU in the FFN, and its parts are apart",
    "pvt.modeling_pvt.PvtEfficientSelfAttention": REDUCED,
    "pvt_v2.modeling_pvt_v2.PvtV2SelfAttention": REDUCED,
    "sam.modeling_sam.SamVisionAttention": RELATIVE,
    "sam.modeling_sam.SamVisionSdpaAttention": RELATIVE,
    "sam2.modeling_sam2.Sam2FeedForward": "the same class serves as heads of several layers",
    "sam2.modeling_sam2.Sam2MultiScaleAttention": POOLED,
    "sam_hq.modeling_sam_hq.SamHQVisionAttention": RELATIVE,
    "sam_hq.modeling_sam_hq.SamHQVisionSdpaAttention": RELATIVE,
    "segformer.modeling_segformer.SegformerAttention": REDUCED,
    "seggpt.modeling_seggpt.SegGptAttention": RELATIVE,
    "swin2sr.modeling_swin2sr.Swin2SRSelfAttention": COSINE,
    "swinv2.modeling_swinv2.Swinv2SelfAttention": COSINE,
    "timesformer.modeling_timesformer.TimesformerSelfAttention": "its layer attends in time and in space by turns",
    "vitdet.modeling_vitdet.VitDetAttention": RELATIVE,
    "vjepa2.modeling_vjepa2.VJEPA2PoolerCrossAttention": CROSS,
}
