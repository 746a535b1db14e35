"""The checks of all exercises: `check_x(your_function)` prints "right", or says on which input it is wrong, and why.

`your_turn(check_x, your_function)` does so inside a lesson, which goes on whatever was written.
"""

from lorakit.course.checks.grading import CheckFailed, your_turn
from lorakit.course.checks.lesson_01_low_rank import (
    check_balance,
    check_best_approximation,
    check_control,
    check_cut,
    check_energy,
    check_largest_rank,
    check_memory,
    check_rank_for_energy,
    check_recount,
)
from lorakit.course.checks.lesson_02_inside import (
    check_forward,
    check_inject,
    check_masked_loss,
    check_training_step,
)
from lorakit.course.checks.lesson_02_lora import (
    check_first_update,
    check_grow,
    check_layer,
    check_merge,
    check_swap,
    check_wrong,
)
from lorakit.course.checks.lesson_03_sft import (
    check_accumulate,
    check_choose_length,
    check_compare,
    check_is_active,
    check_mask,
    check_pack_row,
    check_padding_share,
)
from lorakit.course.checks.lesson_04_qlora import (
    check_code_shares,
    check_four_bits,
    check_round_trip,
    check_step,
    check_storage,
)
from lorakit.course.checks.lesson_05_dora import (
    check_allocate,
    check_equivalent,
    check_portable,
    check_tradeoff,
    check_turned,
)
from lorakit.course.checks.lesson_06_ablations import (
    check_confounds,
    check_design,
    check_rank_table,
    check_seeds_needed,
    check_verdict,
)
from lorakit.course.checks.lesson_07_merging import (
    check_add_adapters,
    check_best_weights,
    check_compress,
    check_expected_share,
    check_swallowed,
)
from lorakit.course.checks.lesson_08_forgetting import (
    check_at_equal_success,
    check_intruders,
    check_rate_ratio,
    check_step_flops,
)

__all__ = [
    "CheckFailed",
    "check_accumulate",
    "check_add_adapters",
    "check_allocate",
    "check_at_equal_success",
    "check_balance",
    "check_best_approximation",
    "check_best_weights",
    "check_choose_length",
    "check_code_shares",
    "check_compare",
    "check_compress",
    "check_confounds",
    "check_control",
    "check_cut",
    "check_design",
    "check_energy",
    "check_equivalent",
    "check_expected_share",
    "check_first_update",
    "check_forward",
    "check_four_bits",
    "check_grow",
    "check_inject",
    "check_intruders",
    "check_is_active",
    "check_largest_rank",
    "check_layer",
    "check_mask",
    "check_masked_loss",
    "check_memory",
    "check_merge",
    "check_pack_row",
    "check_padding_share",
    "check_portable",
    "check_rank_for_energy",
    "check_rank_table",
    "check_rate_ratio",
    "check_recount",
    "check_round_trip",
    "check_seeds_needed",
    "check_step",
    "check_step_flops",
    "check_storage",
    "check_swallowed",
    "check_swap",
    "check_tradeoff",
    "check_training_step",
    "check_turned",
    "check_verdict",
    "check_wrong",
    "your_turn",
]
