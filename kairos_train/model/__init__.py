"""The world-action model in single-device terms, legible beside the model specification.

Reading order: `world_action` (both streams) → `passes` (layer by layer) → `streams` (before and after the blocks) →
`block` → `attention` + `windows` (who attends to whom) and `gated_delta_net` + `delta_rule` (the recurrence). `hooks`
is what a parallel layout changes. Shape legend used throughout:

    B batch, F latent frames, L tokens per frame, S = F·L video tokens, A action tokens, N context tokens,
    D model width, H heads, E head width, K key width and V value width of a Gated DeltaNet head.
"""

from kairos_train.model.world_action import ActionContext, HistoryCache, ModelOutput, WorldActionModel

__all__ = ["ActionContext", "HistoryCache", "ModelOutput", "WorldActionModel"]
