"""Every upstream defect that the default modes here mend, with the test that shows it.

The list follows the notes on the reference systems. A defect whose test goes away, or is renamed, fails here. Defects
that are a matter of cost, not of results, name the test that counts the cost.
"""

from __future__ import annotations

import ast
from functools import lru_cache
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
UNIDISC, LLADA = "families/test_defects_unidisc.py", "families/test_defects_llada.py"
MUDDIT, MMADA = "families/test_defects_muddit.py", "families/test_defects_mmada_lumina.py"
MOE, OWN_MOE = "families/test_llada_moe_golden.py", "families/test_llada_moe.py"
LLADA2, OWN_LLADA2 = "families/test_llada2_golden.py", "families/test_llada2.py"
OWN_LLADA_V = "families/test_llada_v.py"
UNI, OWN_UNI = "families/test_llada2_uni_golden.py", "families/test_llada2_uni.py"
OWN_MUDDIT, OWN_MMADA = "families/test_muddit.py", "families/test_mmada.py"
PARALLEL = "families/test_parallel_defects.py"
OWN_DYNIN = "families/test_dynin.py"
OWN_DDIT = "families/test_ddit.py"
POLICIES, ADAPTIVE, SAMPLER = "decoding/test_policies.py", "decoding/test_adaptive.py", "decoding/test_sampler.py"

# system: what upstream does wrong: (module, test)
DEFECTS: dict[str, dict[str, tuple[str, str]]] = {
    "UniDisc": {
        "unconditional sampling returns None": (
            UNIDISC,
            "test_sampling_without_any_condition_gives_text_and_image",
        ),
        "nucleus sampling fails in batches": (UNIDISC, "test_nucleus_sampling_works_row_by_row_in_a_batch"),
        "Winoground scoring raises": (UNIDISC, "test_pairs_are_scored_both_ways"),
        "no backward pass in eager float32": (UNIDISC, "test_the_loss_has_gradients_in_float32"),
        "a mismatching checkpoint loads silently": (UNIDISC, "test_a_checkpoint_that_does_not_fit_is_refused"),
        "images in other places than the last give NaN": (UNIDISC, "test_images_may_stand_anywhere"),
        "demo text drops digits and punctuation": (UNIDISC, "test_text_keeps_digits_and_punctuation"),
        "breakpoints, CUDA assumed, open server": (
            UNIDISC,
            "test_the_library_has_no_breakpoints_no_open_servers_and_no_fixed_device",
        ),
        "dropped text means captioning, not the unconditional stream": (
            UNIDISC,
            "test_the_unconditional_stream_of_a_drawing_hides_its_words",
        ),
        "fully known rows": (UNIDISC, "test_known_rows_cost_nothing_and_stay"),
        "packed samples of the interleaved layout leak": (
            "families/test_unidisc_golden.py",
            "test_interleaved_samples_keep_to_themselves",
        ),
    },
    "MDLM": {
        "NaN at t = 1/T": ("diffusion/test_golden_mdlm.py", "test_the_first_step_takes_the_limit"),
        "the cached step helps only when no row changed": (
            SAMPLER,
            "test_ancestral_makes_no_pass_where_nothing_is_unmasked",
        ),
    },
    "LLaDA": {
        "one prompt length per batch; guidance with an attention mask": (
            LLADA,
            "test_prompts_of_any_length_share_a_batch_and_padding_is_not_seen",
        ),
        "guidance without an attention mask raises": (LLADA, "test_guidance_needs_no_attention_mask"),
        "suppressed ids alias": (
            LLADA,
            "test_suppressing_an_id_changes_no_tensor_of_the_model_and_no_other_id",
        ),
        "masks of the prompt eat the quota of the blocks": (
            LLADA,
            "test_masks_inside_the_prompt_are_filled_and_take_no_ones_quota",
        ),
        "passes that write nothing run": (LLADA, "test_no_pass_is_made_when_nothing_is_left_to_write"),
        "ids are written into the program": (LLADA, "test_ids_are_where_the_vocabulary_says"),
    },
    "MMaDA-Parallel": {
        "words may be codes or [MASK]": (PARALLEL, "test_words_are_text_only_and_a_mask_is_never_said"),
        "the stream without the picture holds it": (PARALLEL, "test_rows_of_guidance_are_made_anew"),
        "streams see other words": (PARALLEL, "test_all_streams_see_the_same_words"),
        "words are guided the wrong way": (PARALLEL, "test_words_are_guided_away_from_no_prompt"),
        "known codes count as hidden": (PARALLEL, "test_known_codes_do_not_count_among_those_that_stay_hidden"),
        "the last code is random": (PARALLEL, "test_the_last_code_is_decoded"),
        "temperature 0 draws": (PARALLEL, "test_codes_are_not_drawn_at_temperature_0"),
        "numbers are cut off by rounding": (PARALLEL, "test_numbers_are_not_cut_off_by_rounding"),
        "another mark than in training": (PARALLEL, "test_a_new_picture_begins_as_in_training"),
        "padding is visible": ("families/test_parallel_golden.py", "test_forward"),
    },
    "LLaDA-MoE": {
        "padding is visible": (MOE, "test_forward"),
        "a config's normalised weights are ignored": (MOE, "test_variants"),
        "the balance loss is that of hidden states": (
            "models/test_experts.py",
            "test_loads_and_the_loss_that_evens_them",
        ),
        "guidance without an attention mask raises": (LLADA, "test_guidance_needs_no_attention_mask"),
        "ids of LLaDA-8B are written into the program": (LLADA, "test_ids_are_where_the_vocabulary_says"),
        "[MASK] is written and uses up quota": (
            OWN_MOE,
            "test_with_compat_mask_is_written_as_the_program_writes_it",
        ),
        "a config without partial_rotary_factor breaks": (OWN_MOE, "test_what_a_config_leaves_out"),
        "no cache": (MOE, "test_a_cache_that_is_refreshed_in_every_pass_decodes_the_recorded_batch"),
    },
    "LLaDA-V": {
        "two rows raise": (OWN_LLADA_V, "test_rows_of_a_batch_are_the_rows_alone"),
        "forward with embeddings raises": (OWN_LLADA_V, "test_features_go_through_forward_in_batches"),
        "end-of-text is never written": (OWN_LLADA_V, "test_end_of_text_ends_an_answer_but_for_upstream"),
        "a line of pixels leaves nothing of the map": (OWN_LLADA_V, "test_tiles_of_any_picture"),
    },
    "LLaDA2": {
        "the table of blocks is added and hides nothing (released 2.1)": (
            LLADA2,
            "test_a_mask_that_is_added_is_another_model",
        ),
        "eager attention hides everything; masks of two dimensions are not block-causal": (LLADA2, "test_forward"),
        "an end of text inside the prompt empties the answer": (
            OWN_LLADA2,
            "test_an_end_inside_the_prompt_ends_nothing",
        ),
        "early stop leaves masks in the block and goes on": (OWN_LLADA2, "test_an_early_end_ends_the_row"),
        "[MASK] is written, uses up quota and stays": (LLADA2, "test_no_mask_is_proposed_and_none_is_left"),
        "editing may mask a token again, or never end": (OWN_LLADA2, "test_editing_ends_and_masks_nothing"),
        "a threshold of 0 switches editing off (diffusers)": (
            LLADA2,
            "test_the_sampler_decodes_the_recorded_runs",
        ),
        "2.1 stops before the edits have settled (diffusers)": (LLADA2, "test_the_sampler_decodes_the_recorded_runs"),
        "2.0 stops after a block whatever the setting": (OWN_LLADA2, "test_an_early_end_ends_the_row"),
        "no keys and values are kept between blocks": (LLADA2, "test_the_sampler_decodes_the_recorded_runs"),
        "no batches of unequal prompts": (LLADA2, "test_rows_of_unequal_prompts_share_a_batch"),
    },
    "LLaDA2.0-Uni": {
        "answers may hold image codes and [MASK]": (
            UNI,
            "test_without_compat_pictures_are_the_same_and_answers_are_words",
        ),
        "padding is seen once the pruned prefix is in use": (OWN_UNI, "test_a_row_of_a_batch_is_the_row_alone"),
        "importance is NaN where anything is pinned": (UNI, "test_sprint_keeps_the_recorded_positions"),
        "no prefix is kept from block to block": (OWN_UNI, "test_tokens_of_a_large_picture"),
        "an edit without the picture's direction computes it": (
            OWN_UNI,
            "test_edits_pay_for_the_directions_that_they_use",
        ),
        "long unconditional prompts lose their beginning": (
            OWN_UNI,
            "test_what_guidance_leads_away_from_may_be_longer_than_the_prompt",
        ),
        "batches of one row": (OWN_UNI, "test_a_row_of_a_batch_is_the_row_alone"),
        "blocks behind the picture are decoded": (OWN_UNI, "test_rows_end_with_the_block_of_the_last_code"),
    },
    "Fast-dLLM": {
        "attention masks are ignored": (
            LLADA,
            "test_prompts_of_any_length_share_a_batch_and_padding_is_not_seen",
        ),
        "the dual cache leaves masks behind": (LLADA, "test_no_mask_is_left_however_few_the_steps"),
        "thresholds hang where the best token is [MASK]": (
            "decoding/test_cache_properties.py",
            "test_decodes_end_whatever_the_logits",
        ),
        "the head runs at all positions": (LLADA, "test_the_head_sees_candidates_of_the_block_only"),
        "the suffix is recomputed although only the block matters": (
            POLICIES,
            "test_costs_are_those_of_the_formulas",
        ),
        "no guidance, no stop at end-of-text": (
            LLADA,
            "test_guidance_and_a_stop_at_end_of_text_go_with_every_cache",
        ),
        "the factor rule is off by one": ("families/test_llada.py", "test_the_factor_quirk_is_an_option"),
    },
    "dLLM-Cache": {
        "padded batches are wrong": (ADAPTIVE, "test_rows_of_a_padded_batch_are_single_rows"),
        "the quota counts decoded tokens": (ADAPTIVE, "test_the_quota_counts_valid_undecoded_positions_of_each_row"),
        "one cache per process": (ADAPTIVE, "test_requests_share_no_state"),
        "the head runs at all positions": (LLADA, "test_the_head_sees_candidates_of_the_block_only"),
        "grouped heads break": (LLADA, "test_grouped_heads_go_with_every_cache"),
    },
    "dInfer": {
        "nothing is accepted where every best token is [MASK]": (
            "decoding/test_cache_properties.py",
            "test_decodes_end_whatever_the_logits",
        )
    },
    "Muddit and Meissonic": {
        "a fully known row loses a token": (
            MUDDIT,
            "test_no_known_code_is_lost_in_any_precision",
        ),
        "float16 noise masks given tokens again": (MUDDIT, "test_no_known_code_is_lost_in_any_precision"),
        "known codes in any precision": (MUDDIT, "test_no_known_code_is_lost_in_any_precision"),
        "starting ratios are averaged over the batch": (
            MUDDIT,
            "test_rows_with_other_numbers_of_hidden_codes_do_not_depend_on_each_other",
        ),
        "several images per prompt": (MUDDIT, "test_several_images_of_one_prompt"),
        "prompt features only": (MUDDIT, "test_prompt_features_alone_are_enough"),
        "other sizes": (MUDDIT, "test_any_size_that_the_downsampling_divides"),
        "questions too long": ("families/test_muddit_folder.py", "test_texts_and_sizes_that_do_not_fit_are_refused"),
        "a missing mask embedding only prints": (
            "families/test_muddit_folder.py",
            "test_meissonic_draws_but_does_not_write",
        ),
        "answers are the argmax of the last logits": (MUDDIT, "test_answers_are_the_sampled_tokens"),
        "no joint generation, no inpainting": (
            MUDDIT,
            "test_joint_generation_and_inpainting_of_text_and_image",
        ),
        "an unknown config key is dropped": (OWN_MUDDIT, "test_other_configurations_are_refused"),
    },
    "MMaDA": {
        "the temperature falls cumulatively": (OWN_MMADA, "test_temperature_falls_once_and_not_again_and_again"),
        "inpainting counts known positions": (
            OWN_MMADA,
            "test_inpainting_spreads_the_unknown_positions_over_all_steps",
        ),
        "a fully known row loses a code": (OWN_MMADA, "test_known_rows_and_known_codes_stay"),
        "guidance ignores the attention mask (text)": (OWN_MMADA, "test_text_guidance_sees_no_padding"),
        "guidance ignores the attention mask (images)": (MMADA, "test_mmada_guidance_and_padding_go_together"),
        "answers may hold image ids": (OWN_MMADA, "test_answers_hold_text_ids_only"),
        "the training mask is a bias": (
            OWN_MMADA,
            "test_training_mask_hides_padding_unless_the_bias_is_asked_for",
        ),
        "the image loss counts the marks": (OWN_MMADA, "test_image_loss_leaves_the_marks_out"),
        "long prompts are cut silently": (OWN_MMADA, "test_questions_and_texts_too_long_are_refused_not_cut"),
    },
    "Dynin-Omni": {
        "codes stay masked in the unconditional rows of a picture": (
            OWN_DYNIN,
            "test_codes_of_the_unconditional_rows_are_those_that_were_decoded",
        ),
        "the unconditional rows of an edit have its words": (OWN_DYNIN, "test_edits_are_guided_away_from_no_words"),
        "counts of all codes, noise that falls cumulatively": (
            OWN_DYNIN,
            "test_how_many_codes_stay_and_the_noise_of_the_ranking",
        ),
        "a picture beside words is drawn in the first pass": (
            OWN_DYNIN,
            "test_a_picture_beside_words_takes_all_its_steps",
        ),
        "words beside a picture stand otherwise than in training": (
            OWN_DYNIN,
            "test_words_beside_a_picture_stand_as_in_training",
        ),
        "[MASK] is written, uses up quota and stays": (OWN_DYNIN, "test_no_mask_is_drawn"),
        "rows of a batch have to be aligned": (OWN_DYNIN, "test_rows_need_not_be_aligned"),
        "long prompts are cut silently": (OWN_DYNIN, "test_what_does_not_fit_is_refused"),
    },
    "Lumina-DiMOO": {
        "a just-revealed token is not recomputed": (
            "decoding/test_max_logit.py",
            "test_low_candidates_and_changed_tokens_are_recomputed",
        ),
        "cache without guidance crashes": (MMADA, "test_the_cache_works_without_guidance"),
        "one row per call": (MMADA, "test_several_prompts_of_any_length_in_a_batch"),
        "early stop raises NameError": (MMADA, "test_stopping_early_fills_what_is_left"),
        "codes of a given image are dropped": (MMADA, "test_every_code_of_a_given_image_is_seen"),
        "arguments are changed in place": (MMADA, "test_inputs_are_not_changed"),
    },
    "D-DiT": {
        'draws of "unmask?" and "which token?" are one race in float32': (
            OWN_DDIT,
            "test_float32_races_make_rare_tokens_rarer",
        ),
        "a prediction is used again only while no row of the batch changed": (
            OWN_DDIT,
            "test_the_reference_uses_a_prediction_again_only_while_no_row_changed",
        ),
        "the last evaluation takes the best token of what is left": (
            OWN_DDIT,
            "test_the_reference_way_to_write_is_a_switch",
        ),
        "settings of SD3.5 are dropped silently": (OWN_DDIT, "test_options_that_upstream_drops_are_refused"),
        "released weights of the last block do not load on current diffusers": (
            OWN_DDIT,
            "test_all_context_projections_of_the_last_block_are_taken",
        ),
        "half precision raises outside autocast": (OWN_DDIT, "test_half_precision_needs_no_autocast"),
        "pictures and words are never drawn together": (OWN_DDIT, "test_picture_and_words_together"),
    },
    "image tokenizers": {
        "LlamaGen VQ overflows in float16": (
            "families/test_llamagen.py",
            "test_float16_weights_whose_activations_exceed_its_range_stay_finite",
        ),
        "MAGVIT-v2 overflows in float16": (
            "families/test_magvit.py",
            "test_float16_weights_whose_activations_exceed_its_range_stay_finite",
        ),
    },
    "diffusers' VQModel": {
        "it overflows in float16": (
            "tokens/test_vq_model_precision.py",
            "test_activations_beyond_float16_stay_finite",
        ),
        "encoding leaves the codebook in another dtype": (
            "tokens/test_vq_model_precision.py",
            "test_images_and_codes_round_the_clock",
        ),
    },
    "diffusers loading": {
        "missing weights load silently as random": ("models/test_checked_loading.py", "test_missing_weight"),
        "unknown config keys only warn": ("models/test_checked_loading.py", "test_unknown_config_key"),
    },
}
EVERY = [(system, defect, *where) for system, defects in DEFECTS.items() for defect, where in defects.items()]


@lru_cache
def functions_of(module: str) -> frozenset[str]:
    tree = ast.parse((TESTS / module).read_text(encoding="utf-8"))
    return frozenset(node.name for node in tree.body if isinstance(node, ast.FunctionDef))


@pytest.mark.parametrize(("system", "defect", "module", "test"), EVERY, ids=[f"{e[0]}: {e[1]}" for e in EVERY])
def test_every_defect_has_its_test(system: str, defect: str, module: str, test: str):
    assert test.startswith("test_") and test in functions_of(module), f"{system}: {defect}: {module} has no {test}"


def test_every_test_of_a_defect_is_listed():
    listed = {(module, test) for _, _, module, test in EVERY}
    own = [path.relative_to(TESTS).as_posix() for path in sorted(Path(__file__).parent.glob("test_defects_*.py"))]
    for module in own:
        if not module.endswith("test_defects_index.py"):
            names = {name for name in functions_of(module) if name.startswith("test_")}
            assert {name for name in names if (module, name) not in listed} == set()
