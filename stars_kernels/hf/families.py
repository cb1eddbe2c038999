"""Which classes of transformers the engine takes as a language model, and which it refuses and why.

A class is in WORKS because tests built a tiny random model of it and compared, in float64, its logits through the fork
cache with its own, and decoded answers with the plain sequential loop's.
"""

from __future__ import annotations

HOOK = "hook"
"""Attention goes through transformers' interface: prefixes are read where they lie."""
GATHERED = "gathered"
"""Attention has no hook: each layer gets copies of whole rows."""
STATES = "states"
"""As HOOK, and conv or recurrent states are copied for each row."""
STEPS = "steps"
"""As STATES, but transformers itself is wrong for several tokens behind a state: as a language model only."""

_PATHS: dict[str, str] = {
    HOOK: """
        AXK1ForCausalLM AfmoeForCausalLM ApertusForCausalLM ArceeForCausalLM AriaTextForCausalLM BeamForCausalLM
        BertGenerationDecoder BertLMHeadModel BioGptForCausalLM BitNetForCausalLM CTRLLMHeadModel Cohere2ForCausalLM
        Cohere2MoeForCausalLM CohereCompassForCausalLM CohereForCausalLM CwmForCausalLM DbrxForCausalLM
        DeepseekV2ForCausalLM DeepseekV3ForCausalLM DiffLlamaForCausalLM Dots1ForCausalLM ElectraForCausalLM
        Emu3ForCausalLM Ernie4_5ForCausalLM Ernie4_5_MoeForCausalLM ErnieForCausalLM Exaone4ForCausalLM
        ExaoneMoeForCausalLM FlexOlmoForCausalLM FlintForCausalLM FuyuForCausalLM GPT2LMHeadModel GPTBigCodeForCausalLM
        GPTNeoXForCausalLM Gemma2ForCausalLM Gemma3ForCausalLM Gemma3ForConditionalGeneration Gemma3nForCausalLM
        Gemma4ForCausalLM Gemma4ForConditionalGeneration Gemma4UnifiedForCausalLM GemmaForCausalLM Glm4ForCausalLM
        Glm4MoeForCausalLM Glm4MoeLiteForCausalLM GlmForCausalLM GptOssForCausalLM GraniteForCausalLM
        GraniteMoeForCausalLM GraniteMoeSWAForCausalLM GraniteMoeSharedForCausalLM GraniteSWAForCausalLM HYV3ForCausalLM
        HeliumForCausalLM HrmTextForCausalLM HunYuanDenseV1ForCausalLM HunYuanMoEV1ForCausalLM HyperCLOVAXForCausalLM
        Jais2ForCausalLM JetMoeForCausalLM Kolibri1ForCausalLM LagunaForCausalLM LlamaForCausalLM
        LongcatFlashForCausalLM MellumForCausalLM MiMoV2FlashForCausalLM MiniCPM3ForCausalLM MiniMaxM2ForCausalLM
        Ministral3ForCausalLM MinistralForCausalLM MistralForCausalLM MixtralForCausalLM MllamaForCausalLM
        ModernBertDecoderForCausalLM MoshiForCausalLM MossTranscribeDiarizeForConditionalGeneration NanoChatForCausalLM
        NemotronForCausalLM OPTForCausalLM Olmo2ForCausalLM Olmo3ForCausalLM OlmoForCausalLM OlmoeForCausalLM
        PersimmonForCausalLM Phi3ForCausalLM Phi4MultimodalForCausalLM PhiForCausalLM PhimoeForCausalLM Qwen2ForCausalLM
        Qwen2MoeForCausalLM Qwen3ForCausalLM Qwen3MoeForCausalLM RoCBertForCausalLM SeedOssForCausalLM
        SmolLM3ForCausalLM SolarOpenForCausalLM StableLmForCausalLM Starcoder2ForCausalLM VaultGemmaForCausalLM
        WhisperForCausalLM YoutuForCausalLM
    """,
    GATHERED: """
        BloomForCausalLM CodeGenForCausalLM FalconForCausalLM GPTJForCausalLM GPTNeoForCausalLM
        GPTNeoXJapaneseForCausalLM GotOcr2ForConditionalGeneration MptForCausalLM XGLMForCausalLM
    """,
    STATES: """
        BailingHybridForCausalLM BambaForCausalLM FalconH1ForCausalLM GraniteMoeHybridForCausalLM KimiLinearForCausalLM
        Lfm2ForCausalLM Lfm2MoeForCausalLM Lfm3ForCausalLM Mamba2ForCausalLM OlmoHybridForCausalLM Qwen3NextForCausalLM
        Qwen3_5ForCausalLM Qwen3_5MoeForCausalLM ZayaForCausalLM
    """,
    STEPS: "FalconMambaForCausalLM JambaForCausalLM MambaForCausalLM ZambaForCausalLM",
}
WORKS: dict[str, str] = {name: path for path, names in _PATHS.items() for name in names.split()}
"""Class name -> the path it takes."""

CLASSIFIERS: set[str] = set(
    """
    AXK1ForSequenceClassification ArceeForSequenceClassification BioGptForSequenceClassification
    BloomForSequenceClassification CohereCompassTextForSequenceClassification DeepseekV2ForSequenceClassification
    DeepseekV3ForSequenceClassification DiffLlamaForSequenceClassification Exaone4ForSequenceClassification
    FalconForSequenceClassification GPT2ForSequenceClassification GPTBigCodeForSequenceClassification
    GPTJForSequenceClassification GPTNeoForSequenceClassification GPTNeoXForSequenceClassification
    Gemma2ForSequenceClassification Gemma3ForSequenceClassification Gemma3TextForSequenceClassification
    GemmaForSequenceClassification Glm4ForSequenceClassification GlmForSequenceClassification
    GptOssForSequenceClassification HeliumForSequenceClassification HunYuanDenseV1ForSequenceClassification
    HunYuanMoEV1ForSequenceClassification JetMoeForSequenceClassification LlamaForSequenceClassification
    MiniCPM3ForSequenceClassification Ministral3ForSequenceClassification MinistralForSequenceClassification
    MistralForSequenceClassification MixtralForSequenceClassification MptForSequenceClassification
    NemotronForSequenceClassification OPTForSequenceClassification Olmo2ForSequenceClassification
    Olmo3ForSequenceClassification OlmoForSequenceClassification PersimmonForSequenceClassification
    Phi3ForSequenceClassification PhiForSequenceClassification PhimoeForSequenceClassification
    Qwen2ForSequenceClassification Qwen2MoeForSequenceClassification Qwen3ForSequenceClassification
    Qwen3MoeForSequenceClassification Qwen3NextForSequenceClassification Qwen3_5ForSequenceClassification
    Qwen3_5TextForSequenceClassification SeedOssForSequenceClassification SmolLM3ForSequenceClassification
    StableLmForSequenceClassification Starcoder2ForSequenceClassification
    """.split()
)
"""Causal sequence classifiers on such models: their rewards are tested equal to the plain forward's."""

_REASONS: dict[str, str] = {
    "which takes no position_ids and counts positions from its cache, as if all rows were of one length": """
        BartForCausalLM BigBirdPegasusForCausalLM BlenderbotForCausalLM BlenderbotSmallForCausalLM MBartForCausalLM
        MarianForCausalLM MvpForCausalLM PLBartForCausalLM PegasusForCausalLM RoFormerForCausalLM TrOCRForCausalLM
    """,
    "which counts positions from pad_token_id + 1 and leaves padding out": """
        CamembertForCausalLM Data2VecTextForCausalLM RobertaForCausalLM RobertaPreLayerNormForCausalLM
        XLMRobertaForCausalLM XLMRobertaXLForCausalLM XmodForCausalLM
    """,
    "whose sparse attention lets an indexer, with a cache of its own, choose the keys": """
        AXK2ForCausalLM DeepseekV32ForCausalLM Dots3NoteForCausalLM GlmMoeDsaForCausalLM HYV4ForCausalLM
        MiniMaxM3VLForCausalLM Qwen4ExpForCausalLM
    """,
    "whose attention reads a compressed past from a cache of its own": "DeepseekV4ForCausalLM",
    "whose attention mask is made from the values": "DogeForCausalLM",
    "whose attention adds a bias learned for each distance": "Inkling2ForCausalLM InklingForCausalLM",
    "whose chunked attention the fork cache does not know": "Llama4ForCausalLM",
    "an encoder, causal with is_decoder=True alone, whose masks cannot be seen as its attention has no hook": """
        BigBirdForCausalLM MegatronBertForCausalLM RemBertForCausalLM
    """,
    "whose attention is bidirectional": "XLMWithLMHeadModel XLNetLMHeadModel",
    "which reads tokens of its own before the text, both ways": "CpmAntForCausalLM",
    "whose mask lets an image's tokens see each other; its text model alone works where transformers has one": """
        Gemma4UnifiedForConditionalGeneration GitForCausalLM
    """,
    "which has no cache": "OpenAIGPTLMHeadModel",
    "which keeps its past in a form of its own, not in transformers' caches": """
        BltForCausalLM MiniMaxForCausalLM RecurrentGemmaForCausalLM ReformerModelWithLMHead RwkvForCausalLM
        xLSTMForCausalLM
    """,
    "whose step of one token differs from its own forward: transformers clamps its time steps in the latter alone": """
        NemotronHForCausalLM Zamba2ForCausalLM
    """,
    "which predicts several next tokens in streams of their own": "ProphetNetForCausalLM",
    "which writes several audio codebooks a step, not text": "MusicgenForCausalLM MusicgenMelodyForCausalLM",
    "a drafter, which reads another model's keys": "Gemma4AssistantForCausalLM Gemma4UnifiedAssistantForCausalLM",
    "never built in a test, as it needs the package timm; its text model, Gemma3nForCausalLM, works": """
        Gemma3nForConditionalGeneration
    """,
    "whose forward of several tokens behind a state is wrong in transformers": """
        JambaForSequenceClassification ZambaForSequenceClassification
    """,
    "whose step of one token differs from its own forward in transformers": "Zamba2ForSequenceClassification",
    "whose language model is refused: its attention does not fit the fork cache": """
        AXK2ForSequenceClassification DogeForSequenceClassification MiniMaxForSequenceClassification
        OpenAIGPTForSequenceClassification ReformerForSequenceClassification
    """,
    "whose head is not one linear layer on the last token's hidden state": """
        CTRLForSequenceClassification ModernBertDecoderForSequenceClassification
    """,
}
REFUSED: dict[str, str] = {name: why for why, names in _REASONS.items() for name in names.split()}
"""Class name -> why it cannot be decoded exactly, or cannot be a reward model."""
