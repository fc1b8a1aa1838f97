"""Do the tests notice a bug? One-line bugs ("mutants"), put into a copy of the code one at a time.

python tests/mutants.py                        every mutant, two at a time
python tests/mutants.py magma.py common.py     those of some files
python tests/mutants.py --list                 what there is, without running it

A mutant is killed where a test fails, as it should. One that survives is a bug that the tests would let through.
For a class: break a line, guess which property fails, and look. Each entry of MUTANTS is one such exercise. It names a
file and the tests that should notice; "-" is text that occurs once in that file, "+" what takes its place.
"""

import argparse
import concurrent.futures
import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 120  # seconds, for a mutant may make a test wait for ever; more where the machine is slow (`main`)

MUTANTS = r"""
protocols/layers.py tests/test_layers.py::test_the_term_counts_what_differs_between_neighbours_alone
-         y = y - y.mean(dim=0)
-         term
+         y = y - 0
+         term

protocols/layers.py tests/test_layers.py::test_the_term_counts_what_differs_between_neighbours_alone
- if len(part) >= min(GRAPH, len(order))]
+ if len(part) >= GRAPH]

protocols/layers.py tests/test_layers.py::test_each_block_has_its_neighbours_and_its_rank
- counted(layer, layers[i - 1])
+ counted(layers[i - 1], layer)

protocols/layers.py tests/test_layers.py::test_each_block_has_its_neighbours_and_its_rank
- image_features(block.float())
+ block.float().mean(dim=1)

protocols/layers.py tests/test_layers.py::test_each_block_has_its_neighbours_and_its_rank
- "last": shared(near[i], near[-1])
+ "last": shared(near[i], near[i + 1])

protocols/layers.py tests/test_layers.py::test_each_block_has_its_neighbours_and_its_rank
- "rank_centred": effective_rank(centred)
+ "rank_centred": effective_rank(layer)

protocols/layers.py tests/test_layers.py::test_neighbours_are_the_nearest_others
- distances[torch.arange(len(rows)), rows] = math.inf
+ distances[0, rows[0]] = math.inf

protocols/layers.py tests/test_layers.py::test_neighbours_are_the_nearest_others
-     z = z - z.mean(dim=0)
+     z = z - 0

protocols/layers.py tests/test_layers.py::test_what_is_shared_is_in_both_lists_in_any_order
- (a[:, :, None] == b[:, None]).any(dim=2)
+ (a == b)

protocols/layers.py tests/test_layers.py::test_features_that_are_not_finite_have_no_neighbours
- if not all(bool(layer.isfinite().all()) for layer in layers):
+ if not layers:

protocols/layers.py tests/test_layers.py::test_what_layers_cannot_be_about
- if config.k >= len(chosen):
+ if config.k > len(chosen):

protocols/layers.py tests/test_layers.py::test_a_run_is_shown_beside_its_untrained_encoder
- if subject.encoder is not None]
+ ]

protocols/settings.py tests/test_layers.py::test_a_run_is_shown_beside_its_untrained_encoder
- "layers": {"amp": "off"}
+ "layers": {}

plumbing/report.py tests/test_layers.py::test_a_run_is_shown_beside_its_untrained_encoder
- "hypergradient", "layers")
+ "hypergradient")

protocols/run_folders.py tests/test_layers.py::test_no_labels_are_needed
- "energy", "layers", "relatives", "features"
+ "energy", "features"

protocols/relatives.py tests/test_relatives.py::test_no_tokens_have_a_lower_loss_than_the_floor
- math.exp(-(1 + 1 / (k - 1)) / temperature)
+ math.exp(-1 / temperature)

mixedae.py tests/test_relatives.py::test_codes_of_others_change_what_is_encoded_and_nothing_else
- self.segments[slots if codes is None else codes]
+ self.segments[slots]

protocols/relatives.py tests/test_relatives.py::test_codes_that_drown_the_pictures_give_the_answer_alone
- look(bare, mixture, owners, owners)
+ look(method, mixture, owners, owners)

protocols/relatives.py tests/test_relatives.py::test_each_case_is_what_it_says
- tokens[:, 0]  # (G, N, D) each
+ tokens[:, 1]  # (G, N, D) each

protocols/relatives.py tests/test_relatives.py::test_each_case_is_what_it_says
- look(method, mixture, drawn, owners)
+ look(method, mixture, owners, owners)

protocols/relatives.py tests/test_relatives.py::test_each_case_is_what_it_says
- sums[case] + groups * torch
+ sums[case] + torch

protocols/relatives.py tests/test_relatives.py::test_each_case_is_what_it_says
- plain_batches(chosen[order],
+ plain_batches(chosen,

protocols/relatives.py tests/test_relatives.py::test_each_case_is_what_it_says
-     torch.manual_seed(config.seed)
+     pass

protocols/relatives.py tests/test_relatives.py::test_rows_stand_beside_each_other
- method.encoder.load_state_dict(subject.encoder.state_dict())
+ pass

tests/study.py tests/test_study.py::test_flags_that_would_do_nothing_or_harm_are_refused
- if asked.command == "write" and asked.rest:
+ if False:

tests/study.py tests/test_study.py::test_flags_that_would_do_nothing_or_harm_are_refused
- word.split("=")[0] == "--max-steps"
+ word == "--max-steps"

tests/study.py tests/test_study.py::test_rows_are_settings_of_their_methods_alike_where_they_can_be
- for lam in (64 / 256, 128 / 256))
+ for lam in (1.0, 1.0))

tests/study.py tests/test_study.py::test_rows_are_settings_of_their_methods_alike_where_they_can_be
- LEVELS = 4.0
+ LEVELS = 1.0

tests/study.py tests/test_study.py::test_equal_seconds_are_those_of_mae
- costs["mae"]["epoch"] / costs[name]["epoch"]
+ costs[name]["epoch"] / costs["mae"]["epoch"]

tests/study.py tests/test_study.py::test_equal_seconds_are_those_of_mae
- abs(ratio - 1) <= 0.1
+ abs(ratio - 1) <= 0.2

tests/study.py tests/test_study.py::test_equal_seconds_are_those_of_mae
- * (epochs != usual)}-seed
+ }-seed

tests/study.py tests/test_study.py::test_cheap_rows_come_first_and_seeds_one_after_the_other
- .get("epoch", 0) / ROWS[name].passes)
+ .get("epoch", 0))

tests/study.py tests/test_study.py::test_a_tenth_of_the_labels_is_every_tenth_of_each_class
- rows[rows[:, 0] == label][::10]
+ rows[::10][rows[::10][:, 0] == label]

tests/study.py tests/test_study.py::test_a_table_is_made_stopped_gone_on_with_and_written
- go_on = ["--resume"] * folder.exists()
+ go_on = []

tests/study.py tests/test_study.py::test_a_table_is_made_stopped_gone_on_with_and_written
- and subject not in result.tenth:
+ and True:

tests/study.py tests/test_study.py::test_what_diverges_or_is_anothers_does_not_stop_the_others
- (folder / "diverged.txt").write_text(f"{error}\n")
+ pass

tests/study.py tests/test_study.py::test_runs_that_are_gone_stay_in_the_record_and_later_ones_join_them
- known |= {key: found} if found else {}
+ known = {key: found, **known} if found else known

tests/study.py tests/test_study.py::test_runs_that_are_gone_stay_in_the_record_and_later_ones_join_them
- runs.append(known.get(key))
+ runs.append(found)

tests/study.py tests/test_study.py::test_runs_that_are_gone_stay_in_the_record_and_later_ones_join_them
- found = read_record(record_of(asked))["costs"] | (
+ found = {} | (

tests/study_page.py tests/test_study.py::test_runs_on_other_pictures_do_not_join
- if len({run.pictures for run in runs}) > 1:
+ if False:

tests/study_page.py tests/test_study.py::test_the_chart_leaves_out_results_of_which_the_end_alone_is_known
- if len(run.log) == max(len(other.log) for other in several)]
+ if run.log]

common.py tests/test_common.py::test_each_step_of_each_process_has_draws_of_its_own
- mix_seed(config.seed, step, rank(), 2))
+ mix_seed(config.seed, step, 0, 2))

mlo_mae.py tests/test_mlo_mae.py::test_levels_and_epochs_have_orders_of_their_own
- mix_seed(config.seed, epoch, level))
+ mix_seed(config.seed, epoch))

mlo_mae.py tests/test_mlo_mae.py::test_levels_and_epochs_have_orders_of_their_own
- config.batch_size, mix_seed(config.seed, epoch, level)
+ config.batch_size, mix_seed(config.seed, 0, level)

mlo_mae.py tests/test_mlo_mae.py::test_what_level_three_sees_is_seen_by_no_other
- for step in self.steps_of(epoch)]
+ for step in range(len(self))]

magma.py tests/test_processes.py::test_two_ranks_have_the_gradient_of_one_process
- (self.gathered(self.projector(x)) for x in
+ (self.projector(x) for x in

magma.py tests/test_magma.py::test_regularizer_is_active_from_e_st_for_e_dur_epochs_and_measured_always
- self.active * config.lam, self.active * config.inverse
+ self.active * config.lam, config.inverse

magma.py tests/test_magma.py::test_the_settings_of_the_kernel_reach_the_regularizer
- hidden, 0.5, config.detach_reference)
+ hidden, 0.5)

magma.py tests/test_magma.py::test_recipes_are_tables_4_and_5
- TABLE_5 = TABLE_4 | {"heads": 3}
+ TABLE_5 = TABLE_4

magma.py tests/test_magma.py::test_recipes_are_tables_4_and_5
- "imagenet": {"e_st": 3},
+ "imagenet": {},

magma.py tests/test_magma.py::test_the_settings_reach_the_losses_and_the_parts
- | ({"heads": config.heads} if config.heads else {})
+ | {}

magma.py tests/test_magma.py::test_the_settings_reach_the_losses_and_the_parts
- {"pool": config.pool,
+ {"pool": "mean",

mlo_mae.py tests/test_mlo_mae.py::test_the_temperature_of_softsort_reaches_it
- self.ratio, config.mask_gradient, config.temperature)
+ self.ratio, config.mask_gradient)

mlo_mae.py tests/test_mlo_mae.py::test_the_number_of_masked_patches_is_no_function_of_the_mask_to_the_gradient
- else mask.detach().sum())
+ else mask.sum())

mlo_mae.py tests/test_mlo_mae.py::test_optimiser_has_groups_of_its_own_for_every_level
- decays(name, p, config.decay_on) != plain
+ decays(name, p) != plain

mlo_mae.py tests/test_mlo_mae.py::test_the_gradient_of_the_masking_network_is_clipped
- clip_grad_norm_(self.masking.parameters(), self.config.clip)
+ clip_grad_norm_(self.masking.parameters(), math.inf)

mlo_mae.py tests/test_mlo_mae.py::test_without_learning_rate_factors_the_paths_weigh_as_in_the_code
- if config.lr_factors else (1.0, 1.0)
+ if config.lr_factors else (rates[0], 1.0)

mlo_mae.py tests/test_mlo_mae.py::test_the_head_of_the_code_has_a_norm_and_dropout
- nn.Dropout(0.1), self.head)
+ nn.Dropout(0.5), self.head)

ebm_pretrain.py tests/test_ebm_pretrain.py::test_sampling_is_eq_2_on_chains_from_uniform_noise
- self.step_size(noisy), config.temperature)
+ self.step_size(noisy))

ebm_pretrain.py tests/test_ebm_pretrain.py::test_log_alpha_has_a_group_of_its_own_without_decay
- for group in optimizer.param_groups:  # with
+ for group in optimizer.param_groups[1:]:  # with

finola.py tests/test_finola.py::test_the_settings_reach_the_parts
- PatchUpsampler(dim, 0 if pooled else config.upsampler_blocks,
+ PatchUpsampler(dim, config.upsampler_blocks,

finola.py tests/test_finola.py::test_the_decoder_is_that_of_table_11_step_by_step
- x = x + rearrange(positions, "(h w) c -> c h w", h=x.shape[2])
+ x = x + 0 * rearrange(positions, "(h w) c -> c h w", h=x.shape[2])

finola.py tests/test_finola.py::test_the_decoder_is_that_of_table_11_step_by_step
- encoded.shape[2:], mode="bilinear")
+ encoded.shape[2:], mode="nearest")

mixedae.py tests/test_mixedae.py::test_attention_blocks_choose_where_it_acts
- {block % size["depth"] for block in blocks}
+ {abs(block) for block in blocks}

magma.py tests/test_magma.py::test_the_exponent_of_the_inverse_kernel_has_a_limit
- / bandwidth(distances)).clamp_max(30)
+ / bandwidth(distances))

magma.py tests/test_magma.py::test_jitter_ops_mean_what_they_say
- torch.where(grey, luma @ colour, colour)
+ torch.where(grey, colour @ luma, colour)

magma.py tests/test_magma.py::test_blur_is_a_gaussian_of_up_to_two_pixels
- draw(0.1, 2.0), 1e-3)
+ draw(0.5, 2.0), 1e-3)

magma.py tests/test_magma.py::test_two_views_are_compared_and_the_first_is_regularized
- return loss, encoded.chunk(2)[0],
+ return loss, encoded.chunk(2)[1],

tests/study_page.py tests/test_study.py::test_the_chart_leaves_out_results_of_which_the_end_alone_is_known
- begun = [run for run in done if run.log[0]["epoch"] == 0]
+ begun = done

tests/study_page.py tests/test_study.py::test_the_chart_leaves_out_results_of_which_the_end_alone_is_known
- if not ends:
+ if True:

tests/study_page.py tests/test_study.py::test_the_legend_names_every_line_of_every_panel
- for one in axes for line in one.get_lines()}
+ for one in axes[:1] for line in one.get_lines()}

tests/study_page.py tests/test_study.py::test_the_page_has_means_deviations_and_what_is_missing
- statistics.stdev(values)
+ statistics.pstdev(values)

tests/study_page.py tests/test_study.py::test_the_page_has_means_deviations_and_what_is_missing
- == "tenth"]
+ != ""]

tests/study_page.py tests/test_study.py::test_the_page_has_means_deviations_and_what_is_missing
- -1 if subject == "trained" else 0]
+ -1]

tests/study_page.py tests/test_study.py::test_the_page_has_means_deviations_and_what_is_missing
- run.log[-1]["epoch"] == epochs and
+ run.log[-1]["epoch"] and

tests/study_page.py tests/test_study.py::test_the_page_has_means_deviations_and_what_is_missing
- before[before.index(END) + len(END) :]
+ before[before.index(END) :]

tests/study_page.py tests/test_study.py::test_the_chart_counts_passes_and_cpu_seconds
- "passes": line["epoch"] * entry.passes,
+ "passes": line["epoch"],

tests/study_page.py tests/test_study.py::test_the_chart_counts_passes_and_cpu_seconds
-         log.append(line | {"passes"
+         log.append(line); line.update({"passes"

tests/study_page.py tests/test_study.py::test_a_cell_tells_of_the_values_that_there_are
- and not math.isnan(value)]
+ ]

tests/study.py tests/test_study.py::test_a_tenth_of_the_labels_is_every_tenth_of_each_class
- if not wanted.exists():
+ if not wanted.parent.exists():

tests/study.py tests/test_study.py::test_a_tenth_of_the_labels_is_every_tenth_of_each_class
- made.unlink(missing_ok=True)
+ pass

plumbing/decoding.py tests/test_decoding.py::test_what_lies_below_a_crop_is_not_decoded_and_changes_no_bit
- int(lowest) + 32
+ int(lowest) - 8

plumbing/decoding.py tests/test_decoding.py::test_what_lies_below_a_crop_is_not_decoded_and_changes_no_bit
- if marker in (b"\xff\xc0", b"\xff\xc1") else frame
+ if marker in (b"\xff\xc0", b"\xff\xc2") else frame

plumbing/decoding.py tests/test_decoding.py::test_a_picture_that_fails_only_in_part_is_decoded_whole
- if whole:
+ if True:

plumbing/decoding.py tests/test_decoding.py::test_a_jpeg_with_a_scan_for_each_colour_is_decoded_whole
- if frame and marker == b"\xff\xda" and data[at + 4 : at + 5] == data[frame + 9 : frame + 10]:
+ if frame:

plumbing/crops.py tests/test_crops.py::test_crop_box_of_one_file_is_that_of_crop_boxes_to_the_last_bit
- place = places[0][0], places[1][0]
+ place = places[1][0], places[0][0]

plumbing/images.py tests/test_images.py::test_mirrored_flips_left_and_right_of_those_that_it_should
- torch.where(mirror[:, None], there, here)
+ torch.where(mirror[:, None], here, there)

evaluate.py tests/test_evaluate.py::test_help_shows_the_values_that_a_protocol_takes_for_a_run
- config.image_size = given.get("image_size", Config.image_size)
+ config.image_size = given.get("image_size", 1)

plumbing/probes.py tests/test_probes.py::test_the_smallest_are_found_block_by_block
- columns = torch.cat([columns, torch.arange(whole, x.shape[1], device=x.device).expand(len(x), -1)], dim=1)
+ columns = columns

plumbing/probes.py tests/test_probes.py::test_the_smallest_are_found_block_by_block
- unflatten(1, (-1, block)).amin(dim=2)
+ unflatten(1, (-1, block)).amax(dim=2)

plumbing/probes.py tests/test_probes.py::test_the_smallest_are_found_block_by_block
- if whole < 2 * k * block:
+ if whole < k:

magma.py tests/test_settings.py::test_notes_tell_what_moved_and_what_cannot_take_effect
- late or not self.e_dur and "--e-dur 0"
+ late

magma.py tests/test_magma.py::test_magma_refuses_settings_that_do_not_exist
- 0 <= weight < math.inf for weight in self.vicreg
+ not weight < 0 for weight in self.vicreg

mixedae.py tests/test_mixedae.py::test_mixedae_refuses_what_makes_no_sense
- if not self.reconstruction and not self.contrast:
+ if False:

magma.py tests/test_magma.py::test_squared_distances_matches_naive_loop
- norms[None, :] - (gram + gram.T)
+ norms[None, :] - gram

magma.py tests/test_magma.py::test_float32_keeps_the_gradient_of_nearly_collapsed_features
- z = z - z.mean(dim=0, keepdim=True)
+ z = z - z.mean()

magma.py tests/test_magma.py::test_eq_7_as_printed_would_reward_what_the_text_wants_to_penalize
- device=w.device) - printed_laplacian(w)
+ device=w.device) + printed_laplacian(w)

magma.py tests/test_magma.py::test_manifold_loss_matches_naive_loop_of_eq_6
- regularized)).sum() / len(regularized) ** 2
+ regularized)).sum() / len(regularized)

magma.py tests/test_magma.py::test_recipes_are_tables_4_and_5
- "heads": 12, "warmup_lr": 3e-5}
+ "heads": 12}

magma.py tests/test_magma.py::test_the_settings_of_the_kernel_reach_the_regularizer
- self.over_layers(inverse_manifold_loss, hidden, 0.5,
+ self.over_layers(inverse_manifold_loss, hidden, 1.0,

magma.py tests/test_magma.py::test_inverse_loss_keeps_the_digits_of_a_small_distance
- squared_distances(regularized.double())
+ squared_distances(regularized)

magma.py tests/test_magma.py::test_image_features_leave_the_cls_token_out
- tokens[:, 1:].mean(dim=1)
+ tokens.mean(dim=1)

magma.py tests/test_magma.py::test_a_shuffled_graph_is_that_of_the_images_in_another_order
- chosen = [x[order] for x in chosen[:-1]] + chosen[-1:]
+ chosen = [x[order] for x in chosen]

magma.py tests/test_magma.py::test_vicreg_loss_matches_naive_loop
- (square.sum() - square.diagonal().sum())
+ square.sum()

magma.py tests/test_magma.py::test_contrast_turns_about_the_mean_of_the_brightened_image
- shift = (brightness * (1 - contrast) * mean_luma)
+ shift = ((1 - contrast) * mean_luma)

magma.py tests/test_magma.py::test_blur_is_a_gaussian_of_up_to_two_pixels
- torch.exp(-0.5 * (apart / sigma) ** 2)
+ torch.exp(-((apart / sigma) ** 2))

magma.py tests/test_magma.py::test_jitter_ops_mean_what_they_say
- + angle.sin() * axis
+

magma.py tests/test_magma.py::test_regularizer_is_active_from_e_st_for_e_dur_epochs_and_measured_always
- <= epoch < self.config.e_st + self.config.e_dur
+ <= epoch <= self.config.e_st + self.config.e_dur

magma.py tests/test_magma.py::test_loss_is_eq_1
- + config.uniformity * uniformity
+ + uniformity

magma.py tests/test_magma.py::test_two_views_are_compared_and_the_first_is_regularized
- views.transpose(0, 1).flatten(0, 1)
+ views.flatten(0, 1)

magma.py tests/test_processes.py::test_two_ranks_have_the_gradient_of_one_process[fields0]
- return gather(features) if self.config.gather else features
+ return features

magma.py tests/test_magma.py::test_equations_run_in_float32_under_autocast
- autocast(a.device.type, enabled=False)
+ autocast(a.device.type, enabled=True)

magma.py tests/test_magma.py::test_layers_and_their_pairs_are_the_sum_over_k_of_eq_2
- for reference in references) / len(references)
+ for reference in references)

magma.py tests/test_magma.py::test_the_term_between_all_blocks_is_logged_without_a_gradient
- manifold_loss(later, earlier, *settings) for
+ manifold_loss(earlier, later, *settings) for

magma.py tests/test_magma.py::test_the_term_between_all_blocks_is_logged_without_a_gradient
- terms |= self.along_the_blocks(hidden, *kernel, config.diagonal, config.laplacian)
+ terms |= self.along_the_blocks(hidden, *kernel)

magma.py tests/test_magma.py::test_the_term_between_all_blocks_is_logged_without_a_gradient
-     @torch.no_grad()
-     def along_the_blocks
+     def along_the_blocks

mixedae.py tests/test_mixedae.py::test_the_image_with_one_more_cell_is_drawn
- (rank + shift) % images_per_group
+ rank % images_per_group

mixedae.py tests/test_mixedae.py::test_assignments_partition_the_positions_in_balance_and_in_cells
- "g (h w) -> g (h p w q)"
+ "g (h w) -> g (h p q w)"

mixedae.py tests/test_mixedae.py::test_topk_attention_matches_naive_loop
- q.shape[-1] ** -0.5
+ q.shape[-2] ** -0.5

mixedae.py tests/test_mixedae.py::test_topk_attention_survives_ties_and_overflow
- return scores.clamp(-65504, 65504) if scores.dtype == torch.float16 else scores
+ return scores

mixedae.py tests/test_mixedae.py::test_the_cls_token_sees_every_patch_and_is_seen_by_all
  tests/test_mixedae.py::test_the_attention_of_the_method_matches_a_loop
- torch.cat([always, keys + exempt], dim=-1)
+ torch.cat([always, keys], dim=-1)

mixedae.py tests/test_mixedae.py::test_segment_code_is_a_sine_cosine_code_of_the_slot
- F.normalize(code - code.mean(dim=0), dim=1)
+ F.normalize(code, dim=1)

mixedae.py tests/test_mixedae.py::test_the_settings_reach_the_parts
- config.topk or round(len(vit.positions) / k)
+ config.topk or len(vit.positions) // k

mixedae.py tests/test_mixedae.py::test_oracle_attention_equals_separate_encodes_of_the_visible_patches
- (1, 0, 0, 0), value=False)
+ (1, 0, 0, 0), value=True)

mixedae.py tests/test_mixedae.py::test_segments_are_added_to_the_patches_at_the_input_of_blocks
- F.pad(segment, (0, 0, 1, 0))
+ F.pad(segment, (0, 0, 0, 1))

mixedae.py tests/test_mixedae.py::test_contrast_off_global_attention_and_no_segments_is_naive_mixing
- mask = ~own_patches(assignment, k)
+ mask = own_patches(assignment, k)

mixedae.py tests/test_mixedae.py::test_images_without_mixing_get_the_segments_of_their_slots_too
- expand_as(visible) % k
+ expand_as(visible) // k

mixedae.py tests/test_mixedae.py::test_batches_must_make_whole_groups
- (world_size() * config.accumulate)
+ world_size()

mixedae.py tests/test_mixedae.py::test_the_pictures_show_the_attention_of_the_last_block_that_has_it
- _, weights = seen.found[-1]
+ _, weights = seen.found[0]

mixedae.py tests/test_mixedae.py::test_top_keys_are_the_largest_scores_of_any_sign
- bits >> (size - 1) & torch.iinfo
+ 0 & torch.iinfo

finola.py tests/test_finola.py::test_the_parallel_map_is_the_mean_of_both_walks_to_each_cell
- F.linear(channel_norm(z), matrix)
+ F.linear(channel_norm(z), matrix.T)

finola.py tests/test_finola.py::test_recomputing_keeps_little_for_the_backward_pass
- images.append(recomputed(self.upsampler, part))
+ images.append(self.upsampler(part))

finola.py tests/test_finola.py::test_recomputing_takes_a_sixteenth_of_the_batch_at_a_time
- z.chunk(16):
+ z.split(16):

finola.py tests/test_finola.py::test_recomputed_parts_sum_their_gradients_in_float32
- torch.clear_autocast_cache()
+ pass

finola.py tests/test_finola.py::test_the_settings_reach_the_parts
- config.recompute and not config.compile
+ config.recompute

finola.py tests/test_finola.py::test_recipes_are_table_12
- "batch_size": 32, "recompute": False}
+ "batch_size": 32}

common.py tests/test_finola.py::test_recomputing_keeps_little_for_the_backward_pass
- recomputed(block, x, tokens, again=self.recompute)
+ block(x, tokens)

common.py tests/test_finola.py::test_recomputing_keeps_little_for_the_backward_pass
- x = recomputed(self.lite, F.relu6(self.stem(self.normalize(images))), again=self.recompute)
+ x = self.lite(F.relu6(self.stem(self.normalize(images))))

plumbing/recompute.py tests/test_finola.py::test_recomputing_changes_nothing_that_a_step_leaves_behind
- if next(calls) == 0:
+ if next(calls) >= 0:

plumbing/recompute.py tests/test_finola.py::test_recomputing_changes_nothing_that_a_step_leaves_behind
- x.clone() for name, x
+ x for name, x

plumbing/recompute.py tests/test_finola.py::test_recomputing_changes_nothing_that_a_step_leaves_behind
- next(calls) == 0
+ False

plumbing/settings.py tests/test_finola.py::test_a_run_goes_on_with_or_without_recomputing
- "out", "recompute", "resume"
+ "out", "resume"

finola.py tests/test_finola.py::test_blockwise_matches_the_cell_by_cell_version_at_every_offset
- (cell < corner + block)
+ (cell <= corner + block)

finola.py tests/test_finola.py::test_states_keep_float32_under_autocast
- q = q.to(self.right.dtype)[None]
+ q = q[None]

finola.py tests/test_finola.py::test_transposing_or_mirroring_the_map_swaps_the_matrices
- (across_first + along_first.transpose(0, 1)) / 2
+ across_first

finola.py tests/test_finola.py::test_transposing_or_mirroring_the_map_swaps_the_matrices
- walks_differ = True
+ walks_differ = False

finola.py tests/test_finola.py::test_pde_residuals_match_the_step_by_step_version
- line[:, : place + 1].flip(1)
+ line[:, :place].flip(1)

finola.py tests/test_finola.py::test_orders_residual_is_the_step_of_eq_5_that_needs_clairauts_theorem
- apart(F.linear(n_y, a.double()), F.linear(n_x, b.double()))
+ apart(F.linear(n_y, b.double()), F.linear(n_x, a.double()))

finola.py tests/test_finola.py::test_eq_4_holds_where_its_proof_does
- z_n[:, :, :-1].diff(dim=1), z_n[:, :-1].diff(dim=2)
+ z_n[:, :-1].diff(dim=2), z_n[:, :, :-1].diff(dim=1)

protocols/finola_figures.py tests/test_finola_figures.py::test_what_the_analysis_measures
- orders_residual(quadrant, right, down)
+ orders_residual(quadrant, down, right)

finola.py tests/test_finola.py::test_gaussian_curvature_matches_eq_9_and_turns_with_the_surface
- z_xx * z_yy - z_xy.square()
+ z_xx * z_yy + z_xy.square()

finola.py tests/test_finola.py::test_mirrors_interpolations_and_components
- return 2 * mean - q
+ return 2 * q - mean

finola.py tests/test_finola.py::test_attention_pooling_is_attention_of_one_query_without_projections
- "b (n c) h w -> b n (h w) c"
+ "b (c n) h w -> b n (h w) c"

finola.py tests/test_finola.py::test_q_can_be_put_in_the_corners_and_matrices_without_use_are_frozen
- {"right": column == last, "left": column == 0,
+ {"right": column == 0, "left": column == last,

finola.py tests/test_finola.py::test_blocks_float_over_the_whole_grid
- torch.randint(0, self.size // 2 + 1,
+ torch.randint(0, self.size // 2,

finola.py tests/test_finola.py::test_masked_e_puts_q_at_the_centre_of_each_images_block
- cut(canvas, half - corner, self.size)
+ cut(canvas, corner, self.size)

finola.py tests/test_finola.py::test_the_probe_measures_psnr_of_test_images
- torch.manual_seed(config.seed)  # the same blocks
+ pass  # the same blocks

finola.py tests/test_finola.py::test_masked_b_leaves_the_visible_block_where_it_is
- self.size, corner[:, 0], corner[:, 1])
+ self.size, corner[:, 1], corner[:, 0])

ebm_pretrain.py tests/test_ebm_pretrain.py::test_the_chain_on_a_quadratic_energy_has_the_law_that_is_known
- x = x + (2 * step_size * temperature) ** 0.5 * eps
+ x = x + (step_size * temperature) ** 0.5 * eps

ebm_pretrain.py tests/test_ebm_pretrain.py::test_without_steps_the_first_derivative_is_enough
- if own and config.descends:
+ if own and config.objective == "energy":

ebm_pretrain.py tests/test_ebm_pretrain.py::test_the_likelihood_loss_has_the_gradient_of_eq_1
- return clean.mean() - sampled.mean()
+ return sampled.mean() - clean.mean()

ebm_pretrain.py tests/test_ebm_pretrain.py::test_sampling_is_eq_2_on_chains_from_uniform_noise
- return (torch.rand_like(images) - self.mean) / self.std
+ return torch.rand_like(images)

ebm_pretrain.py tests/test_ebm_pretrain.py::test_sampling_is_eq_2_on_chains_from_uniform_noise
- if self.training and not self.started:
-             self.set_alpha(noisy)
+ if False:
+             self.set_alpha(noisy)

ebm_pretrain.py tests/test_ebm_pretrain.py::test_pictures_of_sampling_are_a_chain_at_every_quarter
- columns[-1], after - before, alpha, self.config.temperature
+ columns[-1], after, alpha, self.config.temperature

ebm_pretrain.py tests/test_ebm_pretrain.py::test_a_gridded_mask_blanks_whole_squares_and_the_exact_share
- -(-height // patch), -(-width // patch)
+ -(-height // patch), -(-height // patch)

ebm_pretrain.py tests/test_ebm_pretrain.py::test_super_resolution_is_pillows_bicubic_and_repeated_pixels
- mode="bicubic", antialias=True
+ mode="bicubic"

ebm_pretrain.py tests/test_ebm_pretrain.py::test_mixed_takes_each_image_from_one_corruption_and_all_equally_often
- torch.randint(len(corrupted), (len(versions),)
+ torch.randint(len(corrupted) - 1, (len(versions),)

ebm_pretrain.py tests/test_ebm_pretrain.py::test_on_a_quadratic_energy_everything_is_known
- total = step_size * energy(x).sum()
+ total = energy(x).sum()

ebm_pretrain.py tests/test_ebm_pretrain.py::test_steps_are_single_steps_from_detached_images
- x = x.detach() - descent(energy, x, step_size)
+ x = x - descent(energy, x, step_size)

ebm_pretrain.py tests/test_ebm_pretrain.py::test_each_image_counts_alike_whatever_its_share_of_changed_pixels
- (errors / weight.sum(dim=(1, 2, 3)).clamp_min(1)).mean()
+ (errors / weight.sum().clamp_min(1)).sum()

ebm_pretrain.py tests/test_ebm_pretrain.py::test_a_swin_block_is_attention_between_the_cells_of_a_window
- torch.where(apart, -torch.inf, bias)
+ bias + 0 * apart

ebm_pretrain.py tests/test_ebm_pretrain.py::test_the_energy_takes_normalised_images
- self.features(x * self.std + self.mean)
+ self.features(x)

ebm_pretrain.py tests/test_ebm_pretrain.py::test_log_alpha_has_a_group_of_its_own_without_decay
- "weight_decay": 0.0, "lr_scale": config.alpha_lr
+ "weight_decay": config.weight_decay, "lr_scale": config.alpha_lr

ebm_pretrain.py tests/test_ebm_pretrain.py::test_the_step_size_is_set_by_the_first_batch_and_learned_from_then_on
- "started"] = torch.tensor(self.started)
+ "started"] = torch.tensor(False)

ebm_pretrain.py tests/test_ebm_pretrain.py::test_each_task_does_what_its_name_says
- (grayscale(images) - self.mean) / self.std
+ grayscale(clean)

ebm_pretrain.py tests/test_ebm_pretrain.py::test_the_probe_says_what_is_left_task_by_task
- torch.manual_seed(config.seed)  # the same corruptions
+ pass  # the same corruptions

mlo_mae.py tests/test_mlo_mae.py::test_the_mask_is_the_top_and_of_equals_the_first
- descending=True, stable=True)
+ descending=True)

mlo_mae.py tests/test_mlo_mae.py::test_weighted_loss_matches_the_loop_of_eq_1
- (mask * probability * error).sum()
+ (mask * error).sum()

mlo_mae.py tests/test_mlo_mae.py::test_the_two_gradients_of_a_difference_see_the_same_noise
- / (2 * eps)
+ / eps

mlo_mae.py tests/test_mlo_mae.py::test_a_cycle_gives_the_masks_the_derivative_of_all_its_steps
- 2 * lr_tuned * proximal * value
+ lr_tuned * proximal * value

mlo_mae.py tests/test_mlo_mae.py::test_what_level_three_sees_is_seen_by_no_other
- allowed[held_out] = False
+ allowed[trained_on] = False

plumbing/images.py tests/test_mlo_mae.py::test_processes_share_each_levels_batch
- rank() * share : (rank() + 1) * share]
+ :share]

mlo_mae.py tests/test_mlo_mae.py::test_soft_selections_act_on_the_visible_tokens_too
- tokens * (1 - mask)[..., None]
+ tokens

mlo_mae.py tests/test_mlo_mae.py::test_several_steps_below_count_the_last_one
- (unlabelled[-1][0], None), training
+ (unlabelled[0][0], None), training

mlo_mae.py tests/test_mlo_mae.py::test_detached_tokens_keep_the_encoder_from_learning_through_the_masks
- tokens.detach() if config.detach_tokens else tokens
+ tokens

mlo_mae.py tests/test_mlo_mae.py::test_half_precision_has_nearly_the_gradient_of_float32
- self.train()
-         return found
+ return found

mlo_mae.py tests/test_mlo_mae.py::test_two_processes_have_the_gradients_of_one
- "radius": config.radius, "mean": mean_over_processes
+ "radius": config.radius

mlo_mae.py tests/test_mlo_mae.py::test_the_probe_tells_the_heads_accuracy_and_how_often_the_object_is_masked
- hidden.sum() / share.mean()
+ hidden.sum()

mlo_mae.py tests/test_mlo_mae.py::test_the_hypergradient_has_no_dropout
- self.eval()  # no dropout
+ self.train()

mlo_mae.py tests/test_mlo_mae.py::test_a_plan_has_the_form_that_its_example_tells
- step % config.update_every == 0
+ step % config.update_every == 1

mlo_mae.py tests/test_mlo_mae.py::test_the_tuned_encoder_starts_as_the_pretrained_one
- copy.deepcopy(encoder) if
+ encoder if

mlo_mae.py tests/test_mlo_mae.py::test_a_cycle_gives_the_masks_the_derivative_of_all_its_steps
- copy=bool(validation)
+ copy=False

mlo_mae.py tests/test_mlo_mae.py::test_entropy_is_in_bits
- / math.log(2)
+ / 2

mlo_mae.py tests/test_mlo_mae.py::test_through_adamw_it_is_the_derivative_of_the_unrolled_cycle
- / first - m * by_root
+ / first + m * by_root

mlo_mae.py tests/test_mlo_mae.py::test_adamws_derivative_where_a_gradient_is_zero
- torch.where(root > 0, (1 - betas[1]) / second * gradient / root, 0.0)
+ (1 - betas[1]) / second * gradient / root

mlo_mae.py tests/test_mlo_mae.py::test_through_adamw_it_is_the_derivative_of_the_unrolled_cycle
- by_head, lr_head = weighed(by_head, lr_head)
+ lr_head = lr_head if isinstance(lr_head, float) else 1.0

mlo_mae.py tests/test_mlo_mae.py::test_a_cycle_gives_the_masks_the_derivative_of_all_its_steps
- by_tuned, lr_tuned = weighed(mean(by_tuned), lr_tuned)
+ by_tuned, lr_tuned = weighed(mean(by_tuned), lr_tuned)[0], 2.0

mlo_mae.py tests/test_mlo_mae.py::test_a_cycle_gives_the_masks_the_derivative_of_all_its_steps
- lr_encoder = config.gamma * lr_encoder
+ lr_encoder = lr_encoder

mlo_mae.py tests/test_mlo_mae.py::test_half_precision_has_nearly_the_gradient_of_float32
- parameter: parameter.grad for
+ parameter: parameter.grad.clone() for

mlo_mae.py tests/test_mlo_mae.py::test_a_step_that_fp16_leaves_out_has_no_derivative
- torch.where(taken, rate, 0.0)
+ rate

protocols/hypergradient.py tests/test_hypergradient.py::test_the_step_is_torchs_and_has_a_slope_everywhere
- torch.where(v > 0, torch.where(v > 0, v, 1.0).sqrt(), 0.0)
+ v.sqrt()

protocols/hypergradient.py tests/test_hypergradient.py::test_gradients_of_a_cycle
- states[name] = states[name] | after
+ states[name] = states[name] | {}

protocols/hypergradient.py tests/test_hypergradient.py::test_gradients_of_a_cycle
- ({"hypergradient": "exact", "lr_factors": False}, True)
+ ({"hypergradient": "exact", "lr_factors": False}, False)

protocols/hypergradient.py tests/test_hypergradient.py::test_what_level_three_sees_is_what_it_saw_in_training
- "epoch_steps", "seed")
+ "epoch_steps",)

protocols/mask_steps.py tests/test_mask_steps.py::test_a_short_step_does_what_the_derivative_says
- if len(found) > 1 else {}
+ if found else {}

protocols/mask_steps.py tests/test_mask_steps.py::test_a_short_step_does_what_the_derivative_says
- (cycle.losses(short, last=True) - last) / SHORT
+ (cycle.losses(short)[:1] - last) / SHORT

protocols/mask_steps.py tests/test_mask_steps.py::test_a_short_step_does_what_the_derivative_says
- zip(self.masking.items(), parts, strict=True)}, -1)
+ zip(self.masking.items(), parts, strict=True)}, 1)

protocols/mask_steps.py tests/test_mask_steps.py::test_a_short_step_does_what_the_derivative_says
- direction.double() / direction.double().norm()
+ direction.double()

protocols/mask_steps.py tests/test_mask_steps.py::test_a_short_step_does_what_the_derivative_says
- "before": found[i - 1]["exact"]
+ "before": found[i]["exact"]

protocols/mask_steps.py tests/test_mask_steps.py::test_a_short_step_does_what_the_derivative_says
- mix_seed(seed, i, 7)
+ mix_seed(seed, 7)

protocols/mask_steps.py tests/test_mask_steps.py::test_the_cycle_that_is_done_again_is_that_of_the_training
- method.train_head(*self.training, Stepper
+ method.train_head(*self.validation, Stepper

protocols/mask_steps.py tests/test_mask_steps.py::test_the_cycle_that_is_done_again_is_that_of_the_training
- group["lr"] = rate
+ group["lr"] = rate / 2

protocols/mask_steps.py tests/test_mask_steps.py::test_a_far_step_is_as_long_as_one_of_the_training
- first, second = (1 - beta ** float(state["step"]) for beta in group["betas"])
+ first, second = 1, 1

protocols/mask_steps.py tests/test_hypergradient.py::test_a_run_is_looked_into
- directions_of(found, i, config.seed)
+ directions_of(found, 0, config.seed)

protocols/mask_steps.py tests/test_mask_steps.py::test_the_table_and_the_chart
- (spread / count).sqrt()
+ spread.sqrt()

protocols/mask_steps.py tests/test_mask_steps.py::test_the_table_and_the_chart
- (changes < 0).double()
+ (changes > 0).double()

protocols/energy_figures.py tests/test_energy_figures.py::test_energies_go_down_by_step_and_by_line
- (energy[:, 1:] < energy[:, :-1])
+ (energy[:, 1:] < energy[:, :1])

protocols/energy_figures.py tests/test_energy_figures.py::test_energies_go_down_by_step_and_by_line
- float((steps < 0).all(dim=1).float().mean())
+ float((steps < 0).float().mean())

protocols/energy_figures.py tests/test_energy_figures.py::test_what_the_protocol_measures
- method.energy(corrupted + share * lost)
+ method.energy(clean - share * lost)

protocols/energy_figures.py tests/test_energy_figures.py::test_what_the_protocol_measures
- method.energy(corrupted + lost.roll(1, 0))
+ method.energy(clean + lost.roll(1, 0))

protocols/energy_figures.py tests/test_energy_figures.py::test_what_the_protocol_measures
- cosine(chain[1] - corrupted, lost)
+ cosine(chain[-1] - corrupted, lost)

protocols/energy_figures.py tests/test_energy_figures.py::test_the_table_is_about_the_steps_of_the_training
- {percent(downhill[:steps])} % of the images
+ {percent(downhill)} % of the images

protocols/energy_figures.py tests/test_energy_figures.py::test_a_chain_is_at_least_as_long_as_that_of_the_training
- max(CHAIN, method.config.steps)
+ CHAIN

mlo_mae.py tests/test_mlo_mae.py::test_both_orders_of_differentiation_agree
- (x * direction[name]).sum() for name, x
+ x.sum() for name, x

common.py tests/test_common.py::test_patchify_roundtrips_and_matches_naive_loop
- "b c (h p) (w q) -> b (h w) (p q c)"
+ "b c (h p) (w q) -> b (h w) (q p c)"

common.py tests/test_common.py::test_random_mask_has_exact_counts_in_each_row
- order >= noise.shape[1] - round(
+ order > noise.shape[1] - round(

common.py tests/test_ebm_pretrain.py::test_a_swin_block_is_attention_between_the_cells_of_a_window
- "b n (three h d) -> b h n three d"
+ "b n (h three d) -> b h n three d"

common.py tests/test_mobile_former.py::test_a_block_does_what_the_released_one_does
- 2 * a, 2 * b - 1
+ 2 * a, 2 * b

common.py tests/test_mobile_former.py::test_dynamic_relu_and_its_gradient_are_those_of_a_maximum
- (a - b).abs() * F.relu(x)
+ (a - b) * F.relu(x)

common.py tests/test_common.py::test_short_rows_in_half_precision_have_a_softmax_in_float32
- torch.float32 if short else None
+ None

common.py tests/test_common.py::test_visible_tokens_and_their_gradients_are_those_of_the_whole_image
- encoder.positions[visible]  # (B, M, D)
+ encoder.positions[: visible.shape[1]]  # (B, M, D)

common.py tests/test_mobile_former.py::test_weights_start_as_in_the_released_network
- module.kernel_size[0] ** 2 * module.out_channels
+ module.kernel_size[0] ** 2 * module.in_channels

common.py tests/test_common.py::test_autoencoder_target_is_normalized_patch_by_patch
- (patches.shape[-1] - 1)
+ patches.shape[-1]

plumbing/processes.py tests/test_ebm_pretrain.py::test_two_processes_have_the_step_size_and_the_gradients_of_one
-         x /= world_size()
+         pass

plumbing/crops.py tests/test_images.py::test_batch_plan_splits_the_same_global_batches_over_any_number_of_processes
- np.random.SeedSequence(numbers)
+ np.random.SeedSequence(sum(numbers))

plumbing/crops.py tests/test_crops.py::test_crop_boxes_fall_back_to_the_largest_centred_box
- place = torch.where(found, draw[2:, :, 0], 0.5)
+ place = draw[2:, :, 0]

plumbing/crops.py
  tests/test_crops.py::test_random_resized_crop_is_the_identity_for_the_whole_image_and_mirrors_with_flip
- torch.where(flipped, left + w, left)
+ left

plumbing/download.py tests/test_download.py::test_download_throws_away_what_has_another_md5
- if found != md5:
+ if not found:

plumbing/datasets.py tests/test_datasets.py::test_cifar_reads_the_official_binary_layout
- records[:, label_bytes - 1].long()
+ records[:, 0].long()

plumbing/images.py tests/test_images.py::test_views_of_an_image_stand_side_by_side
- self.images[indices].repeat_interleave(views, dim=0)
+ self.images[indices].repeat(views, 1, 1, 1)

plumbing/probes.py tests/test_probes.py::test_knn_accuracy_matches_naive_loop
- k, right, classes = min(k, len(bank)), 0,
+ k, right, classes = min(k + 1, len(bank)), 0,

plumbing/probes.py tests/test_probes.py::test_ridge_accuracy_picks_the_strength_by_true_leave_one_out
- clamp_max(1 - 1e3 * torch.finfo(train.dtype).eps)
+ clamp_max(1 - 1e-4)

plumbing/probes.py tests/test_probes.py::test_probe_leaves_unlabelled_images_out
- data.labels >= 0
+ data.labels > 0

plumbing/settings.py tests/test_settings.py::test_with_fewer_epochs_a_recipe_keeps_its_shape
- values, given) if shorter else []
+ values, given)

plumbing/settings.py tests/test_settings.py::test_with_fewer_epochs_a_recipe_keeps_its_shape
  tests/test_train.py::test_a_run_of_one_step_learns_and_says_what_it_leaves_out
- values, given) if shorter else []
+ values, {})

plumbing/settings.py tests/test_settings.py::test_what_is_given_is_kept_where_epochs_shortens_a_recipe
- max(min(x, least), round(Fraction(x * new, old)))
+ round(Fraction(x * new, old))

plumbing/settings.py tests/test_settings.py::test_notes_tell_what_moved_and_what_cannot_take_effect
- if field not in given and after != full[field]:
+ if after != full[field]:

plumbing/settings.py tests/test_settings.py::test_notes_tell_what_moved_and_what_cannot_take_effect
- if self.warmup_epochs >= self.epochs:
+ if self.warmup_epochs > self.epochs:

magma.py tests/test_settings.py::test_with_fewer_epochs_a_recipe_keeps_its_shape
- ("e_st", 0), ("e_dur", 1))
+ ("e_dur", 1))

plumbing/runs.py tests/test_train.py::test_images_that_an_epoch_leaves_out_are_told_where_they_are_more_than_a_tenth
- taken == steps * config.batch_size and taken < 0.9
+ taken < 0.9

plumbing/processes.py tests/test_processes.py::test_one_process_in_an_allocation_of_many_runs_alone
- LAUNCHERS = {"SLURM_STEP_NUM_TASKS"
+ LAUNCHERS = {"SLURM_NTASKS"

plumbing/processes.py tests/test_processes.py::test_processes_that_cannot_find_each_other_are_refused
- torchrun_number("RANK", "", 0, count - 1)
+ torchrun_number("RANK", "", 0, count)

plumbing/errors.py tests/test_settings.py::test_nearest_is_the_name_that_is_meant
- name.startswith(word) or
+

plumbing/asked.py tests/test_train.py::test_mae_is_the_command_of_the_readme
- "mae": "magma --lam 0"
+ "mae": "magma --lam 1"

plumbing/settings.py tests/test_settings.py::test_read_flags_puts_recipes_between_defaults_and_flags
- config_class(**values | given)
+ config_class(**given | values)

common.py tests/test_common.py::test_update_clips_the_true_gradient_under_loss_scaling
- self.scaler.unscale_(self.optimizer)
+ pass

common.py tests/test_mobile_former.py::test_tokens_have_no_weight_decay
- parameter.ndim >= 2 and not name.endswith(
+ not name.endswith(

common.py tests/test_common.py::test_update_accumulates_the_gradient_of_the_whole_batch
- stepper.backward(out["loss"] / len(batches))
+ stepper.backward(out["loss"])

plumbing/runs.py tests/test_runs.py::test_meter_averages_and_stops_at_a_loss_that_is_not_finite
- total / max(1, self.count)
+ total

plumbing/files.py tests/test_files.py::test_load_checkpoint_runs_no_code_and_names_a_bad_file
- weights_only=True
+ weights_only=False

common.py tests/test_common.py::test_each_step_of_each_process_has_draws_of_its_own
- mix_seed(config.seed, step, rank(), 2)
+ mix_seed(config.seed, rank(), 2)

plumbing/runs.py tests/test_faults.py::test_a_signal_ends_the_current_step_and_saves[2-SIGTERM-143]
- stop(step + 1, number)
+ stop(step, number)

plumbing/processes.py tests/test_faults.py::test_a_signal_to_one_process_of_two_stops_both_after_the_same_step
- dist.ReduceOp.MAX
+ dist.ReduceOp.MIN

plumbing/run_files.py tests/test_faults.py::test_a_run_folder_has_one_writer
- fcntl.LOCK_EX | fcntl.LOCK_NB
+ fcntl.LOCK_UN

plumbing/files.py tests/test_faults.py::test_a_full_disk_is_a_clear_error_and_keeps_the_checkpoint
- temporary.unlink(missing_ok=True)
+ path.unlink(missing_ok=True)

plumbing/images.py tests/test_faults.py::test_a_signal_to_the_workers_too_saves
- lambda *_: signal.alarm(30)
+ signal.SIG_DFL

plumbing/crops.py tests/test_crops.py::test_crop_boxes_are_uniform_in_area_place_and_the_logarithm_of_their_aspect
- torch.exp(low + (high - low) * draw[1])
+ ratio[0] + (ratio[1] - ratio[0]) * draw[1]

plumbing/crops.py tests/test_crops.py::test_resample_gives_each_image_its_own_window_and_all_channels_the_same
- rows.repeat_interleave(channels, dim=0)
+ rows.repeat(channels, 1, 1)

plumbing/datasets.py tests/test_shapes.py::test_shapes_for_training_and_for_testing_are_different_pictures
- seed=2 * seed + (split == "test")
+ seed=seed

plumbing/images.py tests/test_images.py::test_each_image_of_a_folder_batch_has_a_crop_of_its_own
- mix_seed(seed, place, view)
+ mix_seed(seed, view)

plumbing/images.py tests/test_images.py::test_batch_plan_splits_the_same_global_batches_over_any_number_of_processes
- self.config.batch_size, mix_seed(self.config.seed, epoch, 0))
+ self.config.batch_size, mix_seed(self.config.seed, 0))

protocols/frozen.py tests/test_frozen.py::test_cached_linear_probe_equals_one_that_encodes_in_every_epoch
- enumerate(plan.draw(epoch))
+ enumerate(plan.draw(0))

plumbing/runs.py tests/test_common.py::test_a_resumed_run_goes_on_with_its_loss_scale
- stepper.scaler.load_state_dict(state["scaler"])
+ pass

common.py tests/test_common.py::test_the_loop_scales_the_learning_rate_of_each_group
- self.rate(step) * group.get("lr_scale", 1.0)
+ self.rate(step)

protocols/frozen.py tests/test_frozen.py::test_class_cosines_match_naive_loop_over_pairs
- (within - alone)
+ within

protocols/frozen.py tests/test_frozen.py::test_the_gap_of_cosines_is_that_of_centred_features
- class_cosines(features - features.mean(dim=0), labels)
+ class_cosines(features, labels)

protocols/frozen.py tests/test_frozen.py::test_cached_linear_probe_equals_one_that_encodes_in_every_epoch
- accuracies(head.eval()(queries), truth)
+ accuracies(head(queries), truth)

protocols/augment.py tests/test_augment.py::test_random_erase_fills_one_box_of_a_share_of_the_images
- device=images.device) < probability
+ device=images.device) > probability

protocols/augment.py tests/test_augment.py::test_geometric_operations_match_pillow_and_fill_what_lies_outside
- align_corners=False
+ align_corners=True

protocols/augment.py tests/test_augment.py::test_rand_augment_draws_every_operation_for_some_images_at_its_magnitude
- * (2 * torch.randint(2, (batch,)) - 1)
+

protocols/augment.py tests/test_augment.py::test_rand_augment_leaves_its_input_alone_and_depends_on_the_seed_alone
- images, batch = images.clone(), len(images)
+ batch = len(images)

protocols/augment.py tests/test_augment.py::test_colour_operations_match_pillow
- values.shape[2] - last) // 255
+ values.shape[2] + last) // 255

protocols/augment.py tests/test_augment.py::test_the_window_of_cutmix_has_the_drawn_area_cut_off_at_the_rims
- share = (1 - beta(cutmix)).sqrt()
+ share = 1 - beta(cutmix)

protocols/heads.py tests/test_heads.py::test_drop_path_of_maps_leaves_out_branches_image_by_image
- module.block.images = len(inputs[0])
+ pass

protocols/heads.py tests/test_heads.py::test_drop_path_of_maps_leaves_out_branches_image_by_image
- for module in encoder.modules() if type(module) in BRANCHES]
+ for module in encoder.blocks if type(module) in BRANCHES]

protocols/heads.py tests/test_heads.py::test_drop_path_of_maps_leaves_out_branches_image_by_image
- ConvNeXtBlock: ("fc2",)}
+ ConvNeXtBlock: ("depthwise",)}

protocols/heads.py tests/test_heads.py::test_drop_path_of_maps_leaves_out_branches_image_by_image
- rate * i / max(1, len(blocks) - 1)
+ rate * i / len(blocks)

protocols/heads.py tests/test_heads.py::test_lars_matches_the_slow_version
- 0.001 * weight / length
+ 0.001 * length / weight

protocols/heads.py tests/test_heads.py::test_drop_path_drops_whole_images_and_keeps_the_mean
- x * keep / (1 - rate)
+ x * keep

protocols/heads.py tests/test_heads.py::test_layer_groups_are_those_of_mae
- above = depth - int(
+ above = depth - 1 - int(

protocols/heads.py tests/test_heads.py::test_layer_groups_are_those_of_mae
- weight_decay if decayed else 0.0
+ weight_decay

protocols/heads.py tests/test_heads.py::test_soft_loss_is_cross_entropy_with_smoothed_labels_summed_over_heads
- + smoothing / classes
+ + smoothing / (classes - 1)

protocols/training.py tests/test_training.py::test_classifier_freezes_the_encoder_and_trains_the_head
- if self.frozen:
-             self.encoder.eval()
+ if not self.frozen:
+             self.encoder.eval()

protocols/training.py tests/test_training.py::test_finetuning_does_not_start_from_a_probe_that_is_not_finished
- , state["step"]) == (digest(subject.encoder), config.data, last)
+ ) == (digest(subject.encoder), config.data)

protocols/training.py tests/test_training.py::test_a_network_from_random_weights_has_no_layer_decay
- layer_decay=1.0
+ layer_decay=0.75

protocols/rows.py tests/test_rows.py::test_a_subject_gives_the_features_that_it_is_told_to
- (split, getattr(self.encoder, "pool", ""))
+ (split, "")

protocols/settings.py tests/test_recipes.py::test_a_batch_that_exceeds_the_images_is_all_of_them
- images - images % max(1, parts)
+ images

protocols/settings.py tests/test_recipes.py::test_finetune_recipe_of_finola_is_its_table_14
- (192, 384, 768).index(
+ (768, 384, 192).index(

protocols/settings.py tests/test_recipes.py::test_settings_refuse_what_makes_no_sense
- <= most or getattr(self, field) == math.inf
+ <= most

protocols/figures.py tests/test_figures.py::test_learned_masks_hide_the_most_probable_patches_and_random_ones_any
- top_mask(probability, share)
+ top_mask(-probability, share)

protocols/figures.py tests/test_figures.py::test_learned_masks_hide_the_most_probable_patches_and_random_ones_any
- [random_mask(*probability.shape, SHARES[0], device=images.device)]
+ [top_mask(probability, SHARES[0])]

protocols/figures.py tests/test_figures.py::test_look_inside_sees_the_attention_and_the_keys_of_the_encoder
- weights[:, :, 0, 1:]
+ weights[:, :, 1:, 0]

protocols/figures.py tests/test_figures.py::test_principal_components_match_the_singular_values
- vectors[:, -count:].flip(1)
+ vectors[:, -count:]

protocols/figures.py tests/test_figures.py::test_a_pure_position_code_vanishes_from_the_keys
- keys - keys.mean(dim=1, keepdim=True)
+ keys - keys.mean(dim=2, keepdim=True)

plumbing/runs.py tests/test_runs.py::test_the_seconds_of_a_log_are_those_of_all_its_starts
- self.seconds + now - self.started
+ now - self.started

plumbing/runs.py tests/test_runs.py::test_the_seconds_of_a_log_are_those_of_all_its_starts
- state |= {"seconds": self.seconds}
+ state |= {"seconds": 0.0}

plumbing/report.py tests/test_report.py::test_nothing_in_a_report_is_fetched_or_runs
- return html.escape(printable(str(value)))
+ return printable(str(value))

plumbing/report.py tests/test_report.py::test_nothing_in_a_report_is_fetched_or_runs
- return html.escape(printable(str(value)))
+ return html.escape(str(value))

plumbing/report.py tests/test_report.py::test_nothing_in_a_report_is_fetched_or_runs
- "default-src 'none'; img-src
+ "img-src

plumbing/report.py tests/test_report.py::test_a_report_stays_below_two_megabytes
- share = ROOM // max(1, len(pictures))
+ share = ROOM

plumbing/report.py tests/test_report.py::test_the_report_of_a_run_has_its_tables_curves_pictures_and_settings
- glob("*.png")) if path.name not in UNSHOWN]
+ glob("*.png"))]

plumbing/report.py tests/test_report.py::test_a_report_leaves_out_what_is_not_there_or_damaged
- contextlib.suppress(OSError, ValueError, SyntaxError, EOFError)
+ contextlib.suppress(OSError)

plumbing/report.py tests/test_report.py::test_without_labels_the_table_is_that_without
- labels = any("knn" in line for line in log)
+ labels = bool(log)

plumbing/run_files.py tests/test_compare.py::test_a_row_tells_the_last_of_the_log_and_what_protocols_found
- key = str((line["protocol"], line.get("data"), settings.get("recipe")))
+ key = str((line["protocol"], settings.get("recipe")))

plumbing/asked.py tests/test_asked.py::test_any_value_is_read_back_exactly
- given.append(f"{flag(name)}={words(value)}")
+ given += [flag(name), words(value)]

plumbing/asked.py tests/test_asked.py::test_any_value_is_read_back_exactly
- found.keys() & fields - {"resume"}
+ found.keys() & fields

plumbing/asked.py tests/test_asked.py::test_each_seed_has_settings_and_a_folder_of_its_own
- configs[-1].moved = config.moved
+ configs[-1].moved = ()

plumbing/settings.py tests/test_asked.py::test_settings_are_read_back_as_they_were
- recipes.items() if saved is None else ():
+ recipes.items():

train.py tests/test_asked.py::test_seeds_are_runs_that_can_be_gone_on_with
- for folder in folders if len(folders) > 1 and not config.resume else ():
+ for folder in ():

train.py tests/test_asked.py::test_seeds_are_runs_that_can_be_gone_on_with
- write_report(folder)
+ folder

protocols/compare.py tests/test_compare.py::test_runs_that_differ_in_their_seed_alone_are_one_row
- OWN = FREE_FIELDS - {"start"} |
+ OWN = FREE_FIELDS |

protocols/compare.py tests/test_compare.py::test_runs_that_differ_in_their_seed_alone_are_one_row
- epoch, precision = self.log[-1]["epoch"],
+ epoch, precision = 0,

protocols/compare.py tests/test_compare.py::test_the_same_run_once_more_is_no_other_seed
- again = seeds.count(run.known.get("seed"))
+ again = 0

protocols/compare.py tests/test_compare.py::test_other_pictures_are_another_row_wherever_they_lie
- digest_of(listing.read_bytes()) if listing.exists() else
+

protocols/compare.py tests/test_compare.py::test_a_column_that_one_seed_lacks_is_not_the_rows
- if all(name in other for other in found):
+ if any(name in other for other in found):

protocols/compare.py tests/test_compare.py::test_the_band_is_one_deviation
- values.std(axis=1, ddof=1)
+ values.std(axis=1)

protocols/compare.py tests/test_compare.py::test_what_rows_differ_in_is_told
- if name not in OWN and all(name in other for other in settings)]
+ if all(name in other for other in settings)]

protocols/compare.py tests/test_compare.py::test_a_comparison_is_printed_and_drawn_and_never_overwrites_another
- isinstance(found, dict) else ["?"]
+ isinstance(found, dict) else []

evaluate.py tests/test_compare.py::test_protocols_run_on_each_run_and_then_the_runs_are_compared
- out = given.pop("out", "")
+ out = given.get("out", "")

plumbing/crops.py tests/test_crops.py::test_padded_crops_have_all_places_equally_often
- torch.randint(2 * pad + 1, (2, batch, 1)
+ torch.randint(2 * pad, (2, batch, 1)

plumbing/crops.py tests/test_crops.py::test_a_padded_crop_is_the_image_moved_over_black
- columns = torch.where(flipped, columns.flip(1), columns)
+ columns = torch.where(flipped, columns, columns.flip(1))

plumbing/images.py tests/test_images.py::test_padded_crops_are_for_images_in_memory
- cut = random_resized_crop if isinstance(crop, tuple) else padded_crop
+ cut = random_resized_crop

protocols/settings.py tests/test_recipes.py::test_the_fine_tuning_of_mixedaes_vit_l_is_its_own
- return self[dim >= 1024]
+ return self[dim > 1024]

protocols/settings.py tests/test_recipes.py::test_mlo_mae_is_fine_tuned_on_cifar_as_its_appendix_says
- given.get("data") in ("cifar10", "cifar100")
+ given.get("data") in ("cifar10",)

plumbing/probes.py tests/test_golden.py::test_ours_equals_the_official_number
- .norm(dim=2) + 1e-5
+ .norm(dim=2) + 1

common.py tests/test_common.py::test_decay_may_act_on_tokens_or_on_all
- spared = ("bias",) if on == "tokens" else
+ spared =

magma.py tests/test_processes.py::test_with_a_graph_in_each_process_the_other_losses_are_gathered_alone
- if self.config.gather_graph else found
+ if self.config else found

plumbing/curves.py tests/test_curves.py::test_the_map_of_the_blocks_has_a_row_for_each_pair_and_a_column_for_each_epoch
- for line in lines] for name in names]
+ for name in names] for line in lines]

plumbing/curves.py tests/test_curves.py::test_the_map_of_the_blocks_has_a_row_for_each_pair_and_a_column_for_each_epoch
- and not name.startswith(BLOCKS):
+ :

plumbing/curves.py tests/test_curves.py::test_the_map_of_the_blocks_has_a_row_for_each_pair_and_a_column_for_each_epoch
- axes.axvline(end + 0.5
+ axes.axvline(end

evaluate.py tests/test_evaluate.py::test_evaluate_draws_every_picture
- if rank() == 0 and (own_out or any(table.values())):
+ if rank() == 0 and any(table.values()):

mlo_mae.py tests/test_mlo_mae.py::test_of_several_steps_of_the_head_the_last_one_is_differentiated
- trainings[-1]
+ trainings[0]

mlo_mae.py tests/test_mlo_mae.py::test_a_fresh_head_starts_each_cycle_where_it_was_at_first
- stepper.optimizer.state.pop(parameter, None)
+ pass

mlo_mae.py tests/test_mlo_mae.py::test_a_plan_has_the_form_that_its_example_tells
- len(images) // (steps * self.config.batch_size)
+ len(images) // self.config.batch_size

plumbing/run_files.py tests/test_compare.py::test_what_was_judged_before_is_not_lost_to_a_line_without_it
- results = (before.get("results", {}) if same else {}) | line["results"]
+ results = line["results"]

plumbing/run_files.py tests/test_compare.py::test_a_comparison_of_foreign_files_is_refused_or_drawn
- and abs(value) < 2**53):
+ ):

plumbing/run_files.py tests/test_report.py::test_a_run_in_progress_shows_its_last_probe
- probed = [line for line in log if names[1] in line and line["epoch"]]
+ probed = log

plumbing/report.py tests/test_report.py::test_many_pictures_and_long_settings_are_cut
- str(value)[:2000]
+ str(value)

plumbing/report.py tests/test_report.py::test_many_pictures_and_long_settings_are_cut
- for path in paths[:MOST]:
+ for path in paths:

protocols/compare.py tests/test_compare.py::test_a_row_of_seeds_has_the_name_that_they_share
- .rstrip("0123456789")
+

protocols/compare.py tests/test_compare.py::test_runs_of_before_and_after_a_setting_was_added_are_alike
- in (LATER | self.known).items()
+ in self.known.items()

protocols/compare.py tests/test_compare.py::test_a_protocol_that_trains_is_refused_before_the_first_run_where_one_has_it
- & set(given) else ():
+ | set(given) else ():

protocols/compare.py tests/test_compare.py::test_a_hundred_rows_have_a_line_each_in_the_legend
- colour // 10 % 4
+ 0

protocols/compare.py tests/test_compare.py::test_what_only_some_seeds_have_and_what_is_older_than_the_log_is_told
- if line.get("epoch", last) != last:
+ if line.get("epoch", last) == last:

protocols/heads.py tests/test_heads.py
- decays(name, parameter, on))
+ decays(name, parameter))

plumbing/curves.py tests/test_curves.py::test_curves_shade_the_epochs_of_the_regulariser
- end = min(start + lasts, last)
+ end = min(start + lasts - 1, last)

plumbing/curves.py tests/test_curves.py::test_an_axis_is_logarithmic_for_positive_values_over_two_decades
- return 0 < 100 * min(values) < max(values)
+ return 100 * min(values) < max(values)

protocols/figures.py tests/test_figures.py::test_the_feature_map_shows_each_class_under_its_name
- text.set(text=name
+ text.set(text=str(label) if label else name

protocols/finola_figures.py tests/test_finola_figures.py::test_the_sheets_of_appendix_e_show_what_their_captions_say
- interpolate(own, mirror(own, mean), 5)
+ interpolate(own, mean.expand_as(own), 5)

protocols/finola_figures.py tests/test_finola_figures.py::test_appendix_e_in_figures_is_what_its_pictures_show
- kinds = (mean[None], q, mirror(q, mean),
+ kinds = (mean[None], q, 2 * q - mean,

protocols/finola_figures.py tests/test_finola_figures.py::test_appendix_e_in_figures_is_what_its_pictures_show
- [max(1, q.shape[1] // 16)]
+ [max(1, q.shape[1] // 8)]

protocols/finola_figures.py tests/test_finola_figures.py::test_appendix_e_in_figures_is_what_its_pictures_show
- halves = (plain + plain.roll(-1, dims=0)) / 2
+ halves = plain

protocols/finola_figures.py tests/test_finola_figures.py::test_appendix_e_in_figures_is_what_its_pictures_show
- for i in (2, 3))
+ for i in (2,))

protocols/finola_figures.py tests/test_finola_figures.py::test_appendix_e_in_figures_is_what_its_pictures_show
- (coarse - plain).square()
+ (coarse - grey).square()

protocols/finola_figures.py tests/test_finola_figures.py::test_the_table_has_means_of_psnr_and_medians_of_the_rest
- found["q"][:: -(-len(found["q"]) // SOME)]
+ found["q"][:SOME]

protocols/finola_figures.py tests/test_finola_figures.py::test_the_table_has_means_of_psnr_and_medians_of_the_rest
- found[name][:, 0].median()
+ found[name].median()

protocols/finola_figures.py tests/test_finola_figures.py::test_residuals_are_those_of_the_channel_norm
- method.config.variant != "masked_b" and method.config.norm == "channel"
+ method.config.variant != "masked_b"

protocols/energy_figures.py tests/test_energy_figures.py::test_what_the_protocol_measures
- energy = method.energy(clean)
+ energy = method.energy(corrupted)

protocols/energy_figures.py tests/test_energy_figures.py::test_a_run_is_trained_probed_and_looked_into
- float(left[steps])
+ float(left[-1])

evaluate.py tests/test_evaluate.py::test_evaluate_knn_is_the_figure_that_the_training_logged
- train = load(given["data"], split=first_split, **options)
+ train = load(given["data"], split="test", **options)

evaluate.py tests/test_evaluate.py::test_evaluate_tests_elsewhere_on_classes_of_the_same_name
- if config.test_data:
+ if False:

evaluate.py tests/test_evaluate.py::test_evaluate_tests_elsewhere_on_classes_of_the_same_name
- given = given | {"resume": True}
+ given = given | {"resume": False}

plumbing/class_folders.py tests/test_evaluate.py::test_evaluate_tests_elsewhere_on_classes_of_the_same_name
- labels += [classes.index(name)] * len(found)
+ labels += [known.index(name)] * len(found)

evaluate.py tests/test_evaluate.py::test_evaluate_loads_no_unlabelled_images
- train = load(given["data"], split=first_split, **options)
+ train = load(given["data"], split="train", **options)

evaluate.py tests/test_evaluate.py::test_evaluate_looks_for_old_folders_before_it_starts
- if not config.resume:
+ if config.resume:

train.py tests/test_train.py::test_train_runs_a_method_by_name_and_prints_the_table
- module.RECIPES, flags
+ {}, flags

train.py tests/test_evaluate.py::test_evaluate_knn_is_the_figure_that_the_training_logged
- for split in ("train", "test"))
+ for split in ("train", "train"))

train.py tests/test_train.py::test_train_hands_on_seed_and_data_flags
- torch.manual_seed(config.seed)
+ torch.manual_seed(0)

train.py tests/test_train.py::test_train_hands_on_seed_and_data_flags
- "download", "skip_bad_images", "max_pixels", "workers")
+ "download", "max_pixels", "workers")

plumbing/decoding.py tests/test_decoding.py::test_what_is_no_jpeg_png_or_webp_is_refused_by_name_and_kind
- if kind not in FORMATS:
+ if kind in ("a text", "empty"):

plumbing/decoding.py tests/test_decoding.py::test_every_opening_of_a_picture_names_the_formats
- io.BytesIO(pixels), formats=[kind])
+ io.BytesIO(pixels))

plumbing/decoding.py tests/test_decoding.py::test_a_turned_picture_is_the_one_that_was_saved_upright
- 5: Image.Transpose.TRANSPOSE
+ 5: Image.Transpose.TRANSVERSE

plumbing/decoding.py tests/test_decoding.py::test_turned_pictures_are_read_at_low_resolution_too
- if turn >= 5 else
+ if turn >= 6 else

plumbing/decoding.py tests/test_decoding.py::test_whatever_is_no_exif_means_upright
- except struct.error:
+ except KeyError:

plumbing/decoding.py tests/test_decoding.py::test_odd_metadata_neither_refuse_nor_change_a_picture
- if kind in (b"IHDR", b"PLTE", b"IDAT", b"IEND"):
+ if kind != b"eXIf":

plumbing/decoding.py tests/test_decoding.py::test_odd_metadata_neither_refuse_nor_change_a_picture
- elif not scans and code < 0xE0:
+ elif not scans and code < 0xFE:

plumbing/decoding.py tests/test_decoding.py::test_jpeg_keeps_what_says_how_its_colours_are_stored
- elif code in COLOURS and
+ elif code == 0xE0 and

plumbing/decoding.py tests/test_decoding.py::test_a_jpeg_of_a_thousand_scans_is_refused_at_once
- (code := data[found.end() - 1]) != 0xD9:
+ (code := data[found.end() - 1]):

plumbing/decoding.py tests/test_decoding.py::test_a_palette_picture_without_its_palette_is_refused
- if image.mode == "P" and image.palette is None:
+ if image.mode == "P" and image.palette:

plumbing/checking.py tests/test_decoding.py::test_max_pixels_of_a_data_set_holds_for_the_check_and_for_each_batch
- f"{digest}-{max_pixels}.json"
+ f"{digest}.json"

train.py tests/test_train.py::test_torchrun_trains_on_two_processes
- if rank() == 0:
+ if True:

train.py tests/test_train.py::test_train_answers_a_mistake_with_one_line_and_code_2
- return run_command(train, argv)
+ return run_command(train, argv) and 1

plumbing/encoders.py tests/test_encoders.py::test_statistics_of_numpy_and_torch_are_saved_as_plain_numbers
- return {name: plain(value, f"field {name}") for name, value in fields.items()}
+ return dict(fields)

plumbing/encoders.py tests/test_encoders.py::test_statistics_of_numpy_and_torch_are_saved_as_plain_numbers
- return tuple(float(x) for x in found)
+ return tuple(values)

plumbing/encoders.py tests/test_encoders.py::test_statistics_that_are_none_are_refused
- not all(above < x < math.inf for x in found)
+ not all(above <= x < math.inf for x in found)

plumbing/encoders.py tests/test_encoders.py::test_a_second_class_of_a_name_is_refused_and_the_first_stays
- if home_of(other) != home_of(cls):
+ if False:

plumbing/encoders.py tests/test_encoders.py::test_a_class_may_be_read_again
- if home_of(other) != home_of(cls):
+ if other is not cls:

plumbing/encoders.py tests/test_encoders.py::test_a_class_may_be_read_again
- getattr(sys.modules.get(module), "__file__", None) or module
+ module

plumbing/encoders.py tests/test_encoders.py::test_every_encoder_refuses_images_of_a_wrong_kind_or_shape_by_one_line
- self.check_images(images)
+ pass

plumbing/encoders.py tests/test_encoders.py::test_images_of_another_size_are_refused_with_what_to_do
- if self.image_sides and (height, width) != self.image_sides:
+ if False:

plumbing/encoders.py tests/test_encoders.py::test_encoders_of_any_size_are_loaded_for_one_that_they_take
- encoder.check_sides(*sides)
+ pass

plumbing/encoders.py tests/test_encoders.py::test_a_file_cannot_ask_for_more_weights_than_it_has_bytes
- if count > limit:
+ if False:

plumbing/encoders.py tests/test_encoders.py::test_a_size_that_cannot_be_is_refused_at_load
- if patch and both[0] * both[1] > 2**18 * patch**2:
+ if False:

plumbing/encoders.py tests/test_encoders.py::test_reading_back_draws_no_random_number_and_lets_other_modules_pass
- with torch.random.fork_rng(devices=[]):
+ if True:

plumbing/encoders.py tests/test_encoders.py::test_an_encoder_that_cannot_be_rebuilt_is_found_when_it_is_saved
- if found.fields != fields:
+ if False:

plumbing/encoders.py tests/test_encoders.py::test_a_damaged_file_loads_or_is_refused_and_takes_no_more_than_it_holds
- not isinstance(state.get("kind"), str)
+ "kind" not in state

plumbing/files.py tests/test_files.py::test_plain_values_are_equal_and_of_pythons_own_kinds
- if isinstance(value, bool | np.bool_):
+ if isinstance(value, bool):

plumbing/files.py tests/test_files.py::test_plain_values_are_equal_and_of_pythons_own_kinds
- str.__str__(value)
+ value

plumbing/files.py tests/test_files.py::test_json_is_read_by_those_who_know_no_nan
- isinstance(value, float) and not math.isfinite(value)
+ value is math.nan

plumbing/probes.py tests/test_probes.py::test_one_value_that_is_not_finite_leaves_no_accuracy
- if unfit(training=bank, test=queries):
+ if False:

plumbing/probes.py tests/test_probes.py::test_few_images_few_classes_and_equal_features_have_an_accuracy
- if unfit(training=train, test=test):
+ if False:

plumbing/probes.py tests/test_probes.py::test_huge_features_are_judged_as_others_are
- bank, queries = bank / scale, queries / scale
+ bank, queries = bank, queries

plumbing/probes.py tests/test_probes.py::test_one_huge_column_hides_no_other_from_a_ridge
- moderate(train.abs().amax(dim=0)).clamp_min(1)
+ moderate(train.abs().max())

plumbing/probes.py tests/test_probes.py::test_a_probe_without_a_value_says_why
- if reason := unfit(training=parts[0], test=parts[2]):
+ if reason := "":

plumbing/probes.py tests/test_probes.py::test_a_ridge_without_a_solution_has_no_accuracy
- except torch.linalg.LinAlgError:
+ except KeyError:

plumbing/tables.py tests/test_tables.py::test_format_table_shows_a_dash_for_what_a_row_lacks_and_for_what_has_no_value
- isinstance(value, int | float) and not math.isnan(value)
+ isinstance(value, int | float)

plumbing/images.py tests/test_command.py::test_a_worker_without_room_in_shared_memory_ends_the_command_by_one_line
- if torch.utils.data.get_worker_info() else parts
+ if False else parts

plumbing/command.py tests/test_command.py::test_too_little_of_something_is_named_with_what_to_do
- if "</torch_" in text or "shared memory" in text:
+ if "shared memory" in text:

plumbing/command.py tests/test_command.py::test_what_the_user_or_another_process_has_said_is_left_as_it_is
- "" if isinstance(error, UserError | NonFiniteLoss | OtherProcessFailed) else foreign_failure(error)
+ foreign_failure(error)

protocols/frozen.py tests/test_frozen.py::test_features_that_are_not_finite_have_no_result_and_a_reason
- if reason := unfit(test=features):
+ if reason := "":

protocols/frozen.py tests/test_frozen.py::test_neighbours_of_huge_and_tiny_features_are_those_of_others
- F.normalize(x / moderate(x.abs().amax(dim=1, keepdim=True)), dim=1)
+ F.normalize(x, dim=1)

protocols/features.py tests/test_features.py::test_a_file_that_was_cut_anywhere_is_completed_to_the_same_bytes
- return (done, start + done * row) if
+ return (done, start + (done + 1) * row) if

protocols/features.py tests/test_features.py::test_what_a_fault_left_is_gone_on_with
- torch.arange(done, len(data))
+ torch.arange(0, len(data))

protocols/features.py tests/test_features.py::test_what_features_depend_on_is_never_mixed
- {"encoder": type(subject.encoder).__name__, "weights": digest(subject.encoder)} | fields
+ {"encoder": type(subject.encoder).__name__} | fields

protocols/features.py tests/test_features.py::test_what_features_depend_on_is_never_mixed
- digest_of(data.listing) if data.listing else config.data
+ config.data

protocols/features.py tests/test_features.py::test_strange_names_come_back_and_plain_ones_stand_as_they_are
- \x1c-\x1e\x85
+ \x85

protocols/features.py tests/test_features.py::test_a_finished_file_is_not_computed_again
- if path.exists():
+ if False:

protocols/heads.py tests/test_features.py::test_tokens_are_the_patches_of_a_transformer_or_the_places_of_a_map
- return rearrange(out, "b d h w -> b (h w) d")
+ return rearrange(out, "b d h w -> b (w h) d")

protocols/features.py tests/test_features.py::test_all_pictures_are_taken_and_labels_stand_where_there_are_some
- if len(data.classes) > 1 and
+ if len(data.classes) > 0 and

protocols/settings.py tests/test_features.py::test_precision_is_float32_unless_it_is_asked_for
- DEFAULTS = {"features": {"amp": "off",
+ DEFAULTS = {"features": {"amp": "bf16",

plumbing/settings.py tests/test_features.py::test_the_settings_of_features_do_not_keep_an_older_run_from_going_on
- FREE_FIELDS |= {"tokens", "test_data"}
+ FREE_FIELDS |= {"test_data"}

evaluate.py tests/test_features.py::test_all_pictures_are_taken_and_labels_stand_where_there_are_some
- first_split = "train" if
+ first_split = "labelled" if

protocols/export.py tests/test_export.py::test_the_printed_lines_give_the_features_of_the_encoder
- num_classes=0, global_pool={pool}, fc_norm=False,
+ num_classes=0, global_pool={pool},

protocols/export.py tests/test_export.py::test_the_printed_lines_give_the_features_of_the_encoder
- if fields["pool"] == "mean" else
+ if fields["pool"] != "mean" else

protocols/export.py tests/test_export.py::test_what_is_there_is_never_overwritten
- if not isinstance(old, dict) or not same(old, weights):
+ if not isinstance(old, dict):

protocols/export.py tests/test_export.py::test_an_encoder_that_timm_has_not_is_refused
- if type(encoder) is not ViT:
+ if False:

plumbing/encoders.py tests/test_export.py::test_an_independent_forward_of_the_weights_is_the_encoder
- "d (p q c) -> d c p q"
+ "d (q p c) -> d c p q"

protocols/frozen.py tests/test_frozen.py::test_clusters_of_huge_features_are_those_of_others_and_one_centre_has_no_index
- alone = unit.square().sum()
+ alone = len(unit)

protocols/training.py tests/test_frozen.py::test_weights_that_are_not_finite_train_no_head
- if not all(parameter.isfinite().all() for parameter in subject.encoder.parameters()):
+ if False:

protocols/rows.py tests/test_frozen.py::test_settings_that_were_edited_are_refused_by_one_line
- if known.get("method") not in list(METHODS):
+ if "method" not in known:

ebm_pretrain.py tests/test_encoders.py::test_images_of_another_size_are_refused_with_what_to_do
- whole_cells = True
+ whole_cells = False

ebm_pretrain.py tests/test_encoders.py::test_images_of_another_size_are_refused_with_what_to_do
- self.smallest_side = self.stride
+ pass

plumbing/class_folders.py tests/test_class_folders.py::test_what_programs_leave_behind_is_no_class_and_no_picture
- return name.startswith((".", "~$")) or name.casefold() in LEFTOVERS
+ return name.startswith(".")

plumbing/class_folders.py tests/test_class_folders.py::test_what_programs_leave_behind_is_no_class_and_no_picture
- and not is_leftover(name)
+ and True

plumbing/class_folders.py tests/test_class_folders.py::test_a_named_set_has_no_more_classes_than_it_has
- if len(classes) > expected:
+ if len(classes) > expected + 1:

plumbing/datasets.py tests/test_class_folders.py::test_what_programs_leave_behind_is_no_class_of_tinyimagenet
- filter(is_image, os.listdir(folder)
+ filter(None, os.listdir(folder)

plumbing/checking.py tests/test_class_folders.py::test_without_a_home_nothing_is_remembered_and_no_folder_is_made
- Path(home, ".cache") if os.path.isabs(home) else None
+ Path(home, ".cache")

plumbing/checking.py tests/test_class_folders.py::test_any_name_that_the_system_allows_is_read_and_shown
- .replace(b"\n", b"\\n")
+ .replace(b"\n", b"\n")

plumbing/checking.py tests/test_class_folders.py::test_survey_tells_names_and_sizes_below_the_root_alone
- digest.update(b"%d\t%s" % (date, lines[-1]))
+ digest.update(lines[-1])

plumbing/errors.py tests/test_class_folders.py::test_printable_writes_a_byte_as_its_number
- ord(c) - 0xDC00:02x
+ ord(c):02x

plumbing/run_files.py tests/test_run_files.py::test_a_run_goes_on_where_its_pictures_were_moved
- ({"data", "pictures"} if "pictures" in old else {"pictures"})
+ {"pictures"}

plumbing/run_files.py tests/test_run_files.py::test_a_run_of_before_pictures_were_listed_is_known_by_its_folder
- ({"data", "pictures"} if "pictures" in old else {"pictures"})
+ {"data", "pictures"}

plumbing/run_files.py tests/test_run_files.py::test_other_pictures_are_refused_with_the_first_that_differs
- name = min(others)
+ name = max(others)

plumbing/run_files.py tests/test_run_files.py::test_a_checkpoint_without_step_or_identity_is_refused
- type(step) is not int or step < 0
+ step is None

plumbing/run_files.py tests/test_run_files.py::test_a_folder_without_a_run_blocks_nothing
- path.name != ".lock" and path.suffix != ".tmp"
+ path.name != ".lock"

plumbing/checking.py tests/test_class_folders.py::test_a_listing_does_not_tell_how_the_folder_was_spelled
- start = len(str(Path(root, "x"))) - 1
+ start = len(str(root)) + 1

plumbing/checking.py tests/test_class_folders.py::test_a_damaged_memory_of_good_pictures_makes_all_be_looked_at
- TypeError, ArithmeticError):
+ TypeError):

plumbing/class_folders.py tests/test_class_folders.py::test_processes_that_see_different_pictures_are_stopped
- check_same(paths, device)
+ check_same([], device)

plumbing/class_folders.py tests/test_class_folders.py::test_a_class_that_leads_nowhere_is_refused
- status = None if is_leftover(entry) else
+ status = None if is_leftover(entry) or not (folder / entry).exists() else

plumbing/class_folders.py tests/test_class_folders.py::test_classes_without_a_picture_are_told
- - set(data.labels.tolist())):
+ - set(labels)):

plumbing/run_files.py tests/test_run_files.py::test_a_run_that_goes_on_tells_where_its_data_are_today
- {"method": method, **dataclasses.asdict(config)}
+ {"method": method, **dataclasses.asdict(config), "data": "photos"}

plumbing/class_folders.py tests/test_class_folders.py::test_a_class_that_holds_images_of_another_is_refused
- above, within = home.is_relative_to(target), target
+ above, within = False, target

plumbing/class_folders.py tests/test_class_folders.py::test_one_folder_under_two_names_is_refused
- (status.st_dev, status.st_ino), entry)
+ (status.st_dev, status.st_ino, entry), entry)

plumbing/class_folders.py tests/test_class_folders.py::test_random_folders_are_read_in_full_or_refused_by_one_line
- (found if is_image(x) and x not in aside
+ (found if is_image(x) and not os.path.islink(os.path.join(place, x))

plumbing/class_folders.py tests/test_class_folders.py::test_the_spelling_of_a_folder_does_not_change_what_is_held_out
- root if root.parts else Path.cwd()  # "." has
+ root  # "." has

plumbing/datasets.py tests/test_datasets.py::test_no_other_word_for_a_split_gives_training_pictures
- if split not in SPLITS:
+ if split == "validation":

plumbing/datasets.py tests/test_datasets.py::test_a_data_set_may_be_a_path_and_nothing_is_none
- if name and Path(name).is_dir():
+ if Path(name).is_dir():

plumbing/datasets.py tests/test_datasets.py::test_cifar_takes_no_copy_for_more_pictures
- if file.stem.rstrip("0123456789") == pattern.removesuffix("*.bin")]
+ if file.stem.rstrip("0123456789")]

plumbing/datasets.py tests/test_datasets.py::test_tinyimagenet_reads_pictures_of_any_ending_and_misses_no_class
- if not names:
+ if not names and label:

plumbing/files.py tests/test_files.py::test_a_line_is_added_behind_what_a_kill_has_left
- rest = b"\n" * cut + text.encode()
+ rest = text.encode()

plumbing/files.py tests/test_files.py::test_a_line_that_has_no_room_leaves_no_piece
- file.truncate(end)
+ pass

plumbing/run_files.py tests/test_run_files.py::test_no_run_is_written_among_its_pictures
- if Path(os.path.realpath(out)).is_relative_to(os.path.realpath(part)):
+ if out.is_relative_to(part):

plumbing/run_files.py tests/test_run_files.py::test_a_run_folder_is_called_by_the_folder_of_its_data
- return Path(os.path.abspath(data)).name or "root"
+ return Path(data).name

evaluate.py tests/test_evaluate.py::test_other_pictures_than_the_runs_are_told_where_none_are_asked_for
- if of_run and rank() == 0:
+ if rank() == 0:

plumbing/download.py tests/test_download.py::test_a_wrong_length_is_one_line_and_in_the_way_of_nothing
- except (OSError, ValueError, http.client.HTTPException)
+ except (OSError, http.client.HTTPException)

plumbing/runs.py tests/test_run_files.py::test_a_start_that_is_refused_is_not_in_the_way_of_the_next
- stack.push(self.leave_no_trace)
+ pass

plumbing/runs.py tests/test_run_files.py::test_a_checkpoint_of_more_steps_than_the_run_has_is_refused
- if first_step > total:
+ if first_step > total + 10**10:

plumbing/encoders.py tests/test_start.py::test_a_start_gives_the_numbers_of_the_official_code
- rearrange(patches, "d c p q -> d (p q c)")
+ rearrange(patches, "d c p q -> d (c p q)")

plumbing/encoders.py tests/test_start.py::test_what_goes_to_timm_comes_back
- if not name.startswith("head.")
+ if name

plumbing/encoders.py tests/test_start.py::test_a_start_gives_the_numbers_of_the_official_code
- name.replace("decoder_pred.", "decoder_head.")
+ name

plumbing/encoders.py tests/test_start.py::test_settings_of_maes_training_beside_the_weights_are_read_and_run_nothing
- safe_globals([argparse.Namespace])
+ safe_globals([])

plumbing/encoders.py tests/test_start.py::test_what_has_no_place_here_is_refused_by_its_name_and_nothing_is_changed
- value.is_floating_point() and needed <= value.untyped_storage().nbytes()
+ value.is_floating_point()

plumbing/files.py tests/test_start.py::test_code_in_a_file_is_never_run
- str(error).rpartition("WeightsUnpickler error: ")[2]
+ str(error)

plumbing/settings.py tests/test_start.py::test_a_run_is_made_longer_and_its_continuation_knows_the_file
- "resume", "start"}
+ "resume"}

plumbing/start.py tests/test_start.py::test_what_has_no_place_here_is_refused_by_its_name_and_nothing_is_changed
- limit = 0.01
+ limit = 1.0

plumbing/start.py tests/test_start.py::test_what_has_no_place_here_is_refused_by_its_name_and_nothing_is_changed
- if error <= limit and given[0, 0].abs().max() <= limit
+ if error <= limit

plumbing/start.py tests/test_start.py::test_what_has_no_place_here_is_refused_by_its_name_and_nothing_is_changed
- if not x.to(value.dtype).isfinite().all():
+ if not x.isfinite().all():

plumbing/start.py tests/test_start.py::test_every_method_of_transformers_starts_from_maes_release
- encoder.normalize_by(given.fields["mean"], given.fields["std"])
+ pass

plumbing/start.py tests/test_start.py::test_a_decoder_of_another_depth_or_with_learned_positions_starts_anew
- taken |= {} if misfit(values, found) else found
+ taken |= found

plumbing/start.py tests/test_start.py::test_a_decoder_of_another_depth_or_with_learned_positions_starts_anew
- rest = {}  # a decoder with positions of another kind
+ pass

plumbing/start.py tests/test_start.py::test_a_last_pt_of_the_same_method_brings_all_of_it
- path.with_name("encoder.pt")
+ path.with_name("encoder.pth")

plumbing/start.py tests/test_start.py::test_a_run_is_made_longer_and_its_continuation_knows_the_file
- hashlib.file_digest(file, "sha256").hexdigest()[:32]
+ str(path)

plumbing/start.py tests/test_start.py::test_another_size_of_images_has_positions_of_its_own_and_a_note
- side = (cells[0] * encoder.patch, cells[1] * encoder.patch)
+ pass

plumbing/start.py tests/test_start.py::test_a_network_of_another_size_is_refused_with_the_flags_that_fit
- found["heads"] != own["heads"]
+ False

magma.py tests/test_start.py::test_a_run_is_made_longer_and_its_continuation_knows_the_file
- self.origin = start_from(self, config, VIT_SIZES)
+ start_from(self, config, VIT_SIZES)

mlo_mae.py tests/test_start.py::test_every_method_of_transformers_starts_from_maes_release
- self.tuned = copy.deepcopy(encoder) if
+ self.tuned = ViT(config.image_size, config.patch, **size, pool="cls", **look) if

finola.py tests/test_start.py::test_a_last_pt_of_the_same_method_brings_all_of_it
- self.origin = start_from(self, config)
+ self.origin = ""

ebm_pretrain.py tests/test_start.py::test_every_method_of_transformers_starts_from_maes_release
- self.origin = start_from(self, config, VIT_SIZES)
+ self.origin = ""

mixedae.py tests/test_start.py::test_every_method_of_transformers_starts_from_maes_release
- self.origin = start_from(self, config, VIT_SIZES)
+ self.origin = ""

plumbing/class_folders.py tests/test_class_folders.py::test_the_share_that_is_held_out_is_five_percent_and_has_a_limit
- 0.05 * 2**64
+ 0.06 * 2**64

plumbing/class_folders.py tests/test_class_folders.py::test_the_share_that_is_held_out_is_five_percent_and_has_a_limit
- set(share[:5000] or order[:1])
+ set(share or order[:1])

plumbing/class_folders.py tests/test_class_folders.py::test_folders_of_many_kinds_are_read
- if (x in chosen) == tests]
+ if (x in chosen) >= tests]

plumbing/class_folders.py tests/test_class_folders.py::test_linked_folders_are_not_entered
- is_leftover(x) or os.path.islink(os.path.join(place, x))
+ is_leftover(x)

plumbing/images.py tests/test_images.py::test_shuffled_takes_every_image_once_in_each_pass
- return torch.cat(passes)[:wanted]
+ return torch.cat(passes)[-wanted:]

plumbing/images.py tests/test_images.py::test_an_epoch_may_have_any_number_of_steps
- self.config.epoch_steps or self.images // self.config.batch_size
+ self.images // self.config.batch_size

plumbing/settings.py tests/test_settings.py::test_max_steps_takes_as_many_steps_as_fit
- epochs = max(1, self.max_steps // steps)
+ epochs = max(1, self.max_steps // steps - 1)

plumbing/settings.py tests/test_settings.py::test_max_steps_takes_as_many_steps_as_fit
- self.epoch_steps = self.max_steps if self.max_steps < steps
+ self.epoch_steps = self.max_steps if self.max_steps > steps

plumbing/probes.py tests/test_probes.py::test_effective_rank_is_that_of_rankmes_equations
- torch.finfo(values.dtype).tiny) + 1e-7
+ torch.finfo(values.dtype).tiny)

plumbing/probes.py tests/test_probes.py::test_a_probe_without_labels_tells_the_rank_alone
- if len(data.classes) else torch.arange(len(data))
+ if True else torch.arange(len(data))

plumbing/runs.py tests/test_runs.py::test_a_few_held_out_pictures_are_mixed_in_whole_groups
- size -= size % getattr(method, "group", 1)
+ size = min(size, len(self.test))

plumbing/runs.py tests/test_runs.py::test_the_held_out_loss_is_that_of_batches_as_large_as_in_training
- torch.manual_seed(seed)
+ pass

plumbing/run_files.py tests/test_run_files.py::test_no_run_is_written_into_a_folder_that_is_all_pictures
- for part in parts or [root] * os.path.isdir(config.data):
+ for part in parts:

protocols/run_folders.py tests/test_evaluate.py::test_protocols_that_need_labels_say_so_where_there_are_none
- and not len(train.classes)]
+ and len(train.classes) == 1]

protocols/training.py tests/test_training.py::test_finetuning_from_a_probed_decoder_starts_where_the_probe_ended
- found.get("epoch_steps") or found["images"]
+ found["images"]

plumbing/runs.py tests/test_runs.py::test_the_held_out_loss_is_that_of_one_schedule
- method.start_epoch(config.epochs - 1)
+ pass

plumbing/runs.py tests/test_run_files.py::test_a_start_that_is_refused_removes_nothing_that_was_there
- self.to_remove = [] if any(path.exists() for path in mine) else mine
+ self.to_remove = mine

plumbing/class_folders.py tests/test_class_folders.py::test_folders_beside_train_are_named
- x.name not in ("train", "val") and x.is_dir()
+ x.name not in ("train", "val") and x.is_file()

plumbing/class_folders.py tests/test_class_folders.py::test_pictures_of_kinds_that_are_not_read_are_named
- if unread:
+ if False:

evaluate.py tests/test_evaluate.py::test_nothing_is_written_among_the_pictures
- if not own_out:
+ if False:

finola.py tests/test_finola.py::test_weights_start_as_documented
- torch.empty(dim, dim).uniform_(-(dim**-0.5), dim**-0.5)
+ 3 * torch.empty(dim, dim).uniform_(-(dim**-0.5), dim**-0.5)

finola.py tests/test_finola.py::test_weights_start_as_documented
- torch.empty(dim).normal_(std=0.02)
+ torch.empty(dim).normal_()

finola.py tests/test_finola.py::test_weights_start_as_documented
- nn.init.normal_(self.queries)
+ nn.init.zeros_(self.queries)

finola.py tests/test_finola.py::test_weights_start_as_documented
- self.apply(initialize)
+ pass

finola.py tests/test_finola.py::test_moving_averages_start_from_mean_0_and_variance_1
- torch.stack([torch.zeros(shape), torch.ones(shape)])
+ torch.stack([torch.zeros(shape), torch.zeros(shape)])

finola.py tests/test_finola.py::test_captions_stand_over_what_they_name
- self.decode(self.feature_map(images)).clamp(0, 1)], dim=1)
+ images], dim=1)

finola.py tests/test_finola.py::test_captions_stand_over_what_they_name
- torch.where(mask > 0, prediction, images)], dim=1)
+ torch.where(mask > 0, 1 - images, images)], dim=1)

finola.py tests/test_finola.py::test_captions_stand_over_what_they_name
- torch.where(mask > 0, self.encoder.mean, images)
+ torch.where(mask > 0, 0.5, images)

finola.py tests/test_finola.py::test_captions_stand_over_what_they_name
- ("image", "masked image", "reconstruction") if self.masked
+ ("image", "reconstruction", "masked image") if self.masked

protocols/finola_figures.py
  tests/test_finola_figures.py::test_the_images_on_the_sheets_are_pulled_along_the_embeddings_of_all_test_images
- gaussian_samples(q, 6 * count
+ gaussian_samples(own.cpu(), 6 * count

protocols/finola_figures.py
  tests/test_finola_figures.py::test_the_images_on_the_sheets_are_pulled_along_the_embeddings_of_all_test_images
- torch.cov(q.T), counts)
+ torch.cov(own.T), counts)

protocols/finola_figures.py
  tests/test_finola_figures.py::test_the_images_on_the_sheets_are_pulled_along_the_embeddings_of_all_test_images
- q.mean(dim=0).to(device)
+ own.mean(dim=0).to(device)

protocols/finola_figures.py
  tests/test_finola_figures.py::test_the_images_on_the_sheets_are_pulled_along_the_embeddings_of_all_test_images
- 6 * count, torch.Generator().manual_seed(0)
+ 6 * count, None

protocols/finola_figures.py
  tests/test_finola_figures.py::test_the_images_on_the_sheets_are_pulled_along_the_embeddings_of_all_test_images
- own = method.embed(images, method.middle(images)).float()
+ own = method.embed(images).float()

protocols/finola_figures.py
  tests/test_finola_figures.py::test_the_surfaces_are_the_channels_that_bend_most_each_in_its_own_range
- z.shape[1]), dim=1).indices
+ z.shape[1]), dim=1, largest=False).indices

protocols/finola_figures.py
  tests/test_finola_figures.py::test_the_surfaces_are_the_channels_that_bend_most_each_in_its_own_range
- z[torch.arange(len(z))[:, None], top], (2, 3)
+ z[torch.arange(len(z))[:, None], top], (1, 2, 3)

protocols/finola_figures.py
  tests/test_finola_figures.py::test_the_surfaces_are_the_channels_that_bend_most_each_in_its_own_range
- captions = ["image", *[f"rank {i + 1}"
+ captions = ["image", *[f"rank {i}"

protocols/finola_figures.py
  tests/test_finola_figures.py::test_the_charts_show_sorted_residuals_and_quartiles_of_the_curvature
- torch.tensor([0.25, 0.5, 0.75])
+ torch.tensor([0.75, 0.5, 0.25])

protocols/finola_figures.py
  tests/test_finola_figures.py::test_the_charts_show_sorted_residuals_and_quartiles_of_the_curvature
- found[name].sort().values for
+ found[name] for

protocols/finola_figures.py
  tests/test_finola_figures.py::test_the_charts_show_sorted_residuals_and_quartiles_of_the_curvature
- median {values.median():.2f}
+ median {values.mean():.2f}

protocols/finola_figures.py tests/test_finola_figures.py::test_the_table_has_means_of_psnr_and_medians_of_the_rest
- found[name][:, 0].median()
+ found[name][:, -1].median()

protocols/finola_figures.py tests/test_finola_figures.py::test_the_table_has_means_of_psnr_and_medians_of_the_rest
- float(values.median()) for name
+ float(values.max()) for name

protocols/energy_figures.py tests/test_energy_figures.py::test_the_table_is_about_the_steps_of_the_training
- values["energy"][:, steps], "clean"
+ values["energy"][:, -1], "clean"

protocols/energy_figures.py tests/test_energy_figures.py::test_the_table_is_about_the_steps_of_the_training
- restored {100 * shares['restored']:.0f} %
+ restored {100 * shares['clean']:.0f} %

protocols/energy_figures.py tests/test_energy_figures.py::test_the_sheets_show_the_chain_of_each_task_step_by_step
- (chain.transpose(0, 1) * method.std + method.mean)
+ chain.transpose(0, 1)

protocols/energy_figures.py tests/test_energy_figures.py::test_the_sheets_show_the_chain_of_each_task_step_by_step
- _, corrupted = method.corrupt(images, task)
+ _, corrupted = method.corrupt(images)

protocols/energy_figures.py tests/test_energy_figures.py::test_the_same_corruptions_are_measured_each_time
- torch.manual_seed(config.seed)
-     for images
+ for images

protocols/figures.py tests/test_figures.py::test_the_pictures_of_a_run_show_what_their_captions_say
- stretch(attention, (2,))
+ stretch(attention, (1, 2))

protocols/figures.py tests/test_figures.py::test_the_pictures_of_a_run_show_what_their_captions_say
- torch.manual_seed(config.seed)
+ pass

protocols/figures.py tests/test_figures.py::test_the_pictures_of_a_run_show_what_their_captions_say
- *[f"block {i + 1}"
+ *[f"block {i}"

protocols/figures.py tests/test_figures.py::test_the_pictures_of_a_run_show_what_their_captions_say
- subject.features("test", config)
+ subject.features("train", config)

protocols/figures.py tests/test_figures.py::test_the_maps_of_the_keys_of_a_block_share_one_range
- stretch(torch.stack(scores, dim=1), (0, 2))
+ stretch(torch.stack(scores, dim=1), (2,))

protocols/frozen.py tests/test_frozen.py::test_the_table_of_clusters_has_each_figure_under_its_name
- (index, same, different,
+ (index, different, same,

protocols/frozen.py tests/test_frozen.py::test_the_table_of_clusters_has_each_figure_under_its_name
- same / different if different
+ different / same if different

protocols/frozen.py tests/test_frozen.py::test_the_linear_result_of_pixels_is_ridge_regression_on_the_training_images
- ridge_accuracy(features, labels, queries, truth, classes)
+ ridge_accuracy(queries, truth, queries, truth, classes)

protocols/frozen.py tests/test_frozen.py::test_linear_heads_are_trained_by_plain_gradient_descent
- learning_rate(epoch * steps + step, steps, config)
+ learning_rate(epoch * steps + step + 1, steps, config)

protocols/rows.py tests/test_frozen.py::test_only_raw_pixels_are_limited_to_twenty_thousand_images
- (20_000 if self.encoder is None else 0)
+ 20_000

protocols/rows.py tests/test_frozen.py::test_eight_classes_at_most_are_drawn_and_without_any_the_first_eight
- unique()[:8]]
+ unique()[:9]]

protocols/heads.py tests/test_heads.py::test_linear_heads_start_small_and_without_bias
- nn.init.zeros_(layer.bias)
+ nn.init.ones_(layer.bias)

protocols/heads.py tests/test_heads.py::test_linear_heads_start_small_and_without_bias
- nn.init.trunc_normal_(layer.weight, std=std)
+ nn.init.trunc_normal_(layer.weight, std=0.01)

protocols/heads.py tests/test_heads.py::test_the_batch_norm_of_linear_heads_learns_nothing_and_keeps_averages
- affine=False, eps=1e-6)
+ affine=True, eps=1e-6)

protocols/heads.py tests/test_heads.py::test_a_transformer_head_is_embedding_blocks_norm_mean_and_a_linear_layer
- self.apply(initialize)
+ pass

protocols/heads.py tests/test_heads.py::test_a_transformer_head_is_embedding_blocks_norm_mean_and_a_linear_layer
- self.dropout(self.norm(x).mean(dim=1))
+ self.dropout(self.norm(x.mean(dim=1)))

protocols/heads.py tests/test_heads.py::test_a_transformer_head_is_embedding_blocks_norm_mean_and_a_linear_layer
- int(kind[-1]), classes
+ 1, classes

protocols/heads.py tests/test_heads.py::test_token_features_are_those_of_the_patches_or_places
- encoder.encode(encoder.embed(images))[:, 1:]
+ encoder.encode(encoder.embed(images))

protocols/heads.py tests/test_heads.py::test_optimisers_and_their_groups_take_what_the_settings_say
- momentum=config.momentum)
+ momentum=0.9)

protocols/heads.py tests/test_frozen.py::test_linear_heads_are_trained_by_plain_gradient_descent
- layer_groups(None, layer, 1.0, config.weight_decay,
+ layer_groups(None, layer, 1.0, 0.0,

protocols/training.py tests/test_training.py::test_heads_start_as_in_maes_release
- std = 2e-5 if protocol == "finetune" else 0.01
+ std = 0.01

protocols/training.py tests/test_training.py::test_heads_start_as_in_maes_release
- torch.manual_seed(config.seed)
+ pass

protocols/training.py tests/test_training.py::test_every_augmentation_takes_the_strength_of_the_settings
- targets, config.mixup, config.cutmix)
+ targets, config.cutmix, config.mixup)

protocols/training.py tests/test_training.py::test_every_augmentation_takes_the_strength_of_the_settings
- rand_augment(images, mean, config.randaugment)
+ rand_augment(images, 0 * mean, config.randaugment)

protocols/training.py tests/test_training.py::test_every_augmentation_takes_the_strength_of_the_settings
- self.classes, self.config.smoothing)
+ self.classes, 0.0)

protocols/training.py tests/test_training.py::test_pictures_are_the_image_and_four_augmentations_of_it
- [images] + [self.augment
+ [self.augment(images, targets)[0]] + [self.augment

protocols/training.py tests/test_training.py::test_finetuning_slows_lower_layers_by_the_decay_of_the_settings
- rates = (config.layer_decay, config.weight_decay, config.decay_on)
+ rates = (1.0, config.weight_decay, config.decay_on)

protocols/training.py tests/test_training.py::test_the_accuracy_is_that_of_the_test_images
- features_of(classify, test, labelled(test),
+ features_of(classify, train, labelled(train),

protocols/augment.py tests/test_augment.py::test_the_boxes_of_random_erasing_have_the_sizes_and_shapes_of_timm
- ratio=(0.3, 1 / 0.3)
+ ratio=(1.0, 1.0)

protocols/augment.py tests/test_augment.py::test_the_boxes_of_random_erasing_have_the_sizes_and_shapes_of_timm
- scale=(0.02, 1 / 3)
+ scale=(0.2, 1 / 3)

protocols/augment.py tests/test_augment.py::test_the_boxes_of_random_erasing_have_the_sizes_and_shapes_of_timm
- std * torch.randn_like(images)
+ std * torch.randn_like(images[:, :1])

protocols/augment.py tests/test_augment.py::test_rand_augment_draws_for_each_image_on_its_own
- choice[torch.rand(batch) < 0.5] = -1
+ choice[torch.rand(1).expand(batch) < 0.5] = -1

mixedae.py
  tests/test_mixedae.py::test_the_picture_of_attention_is_the_mean_over_heads_as_bright_as_its_largest_value
- 1:].float().mean(dim=1)  # (G, N)
+ 1:].float()[:, 0]  # (G, N)

mixedae.py
  tests/test_mixedae.py::test_the_picture_of_attention_is_the_mean_over_heads_as_bright_as_its_largest_value
- light = light / light.amax(dim=1, keepdim=True).clamp_min(1e-12)
+ pass

mixedae.py tests/test_mixedae.py::test_captions_stand_over_what_they_name
- (*[f"image {i}" for i in numbers], "mixture", *[f
+ ("mixture", *[f"image {i}" for i in numbers], *[f

mixedae.py tests/test_mixedae.py::test_captions_stand_over_what_they_name
- x.unflatten(0, (-1, k)) for x in (images, restored)
+ x.unflatten(0, (-1, k)) for x in (images, images)

mixedae.py tests/test_mixedae.py::test_without_mixing_the_pictures_are_maes
- self.autoencoder.pictures_of(images, seen.prediction, seen.mask)
+ self.autoencoder.pictures_of(images, seen.prediction, ~seen.mask)

mixedae.py tests/test_mixedae.py::test_the_settings_reach_the_parts
- segment_code(k, vit.dim, config.segment_centred)
+ segment_code(k, vit.dim)

mixedae.py tests/test_mixedae.py::test_pictures_of_fewer_images_than_a_group_repeat_them
- len(images) // k * k)) % len(images)]
+ len(images) // k * k)).clamp_max(len(images) - 1)]

magma.py tests/test_magma.py::test_captions_stand_over_what_they_name
- self.view(images), self.view(images)], dim=1)
+ self.view(images), images], dim=1)

magma.py tests/test_magma.py::test_captions_stand_over_what_they_name
- return self.autoencoder.pictures(images)
+ return torch.stack([images] * 3, dim=1)

magma.py tests/test_magma.py::test_views_change_as_often_and_as_much_as_the_papers_say
- "grey": 0.2, "blur": 0.5}
+ "grey": 0.5, "blur": 0.5}

magma.py tests/test_magma.py::test_a_share_of_the_views_is_changed
- draw() < strength["apply"]
+ draw() < 0.5

magma.py tests/test_magma.py::test_the_settings_reach_the_losses_and_the_parts
- contrastive_loss(a, b, self.config.temperature)
+ contrastive_loss(a, b)

magma.py tests/test_magma.py::test_the_settings_reach_the_losses_and_the_parts
- vicreg_loss(a, b, self.config.vicreg)
+ vicreg_loss(a, b)

magma.py tests/test_magma.py::test_projectors_have_norms_between_their_layers_as_the_papers_say
- nn.Linear(dim, width), nn.BatchNorm1d(width), nn.ReLU()]
+ nn.Linear(dim, width), nn.ReLU()]

common.py tests/test_magma.py::test_a_masked_autoencoder_starts_as_maes_release
- nn.init.normal_(self.cls_token, std=0.02)
+ nn.init.normal_(self.cls_token)

common.py tests/test_magma.py::test_a_masked_autoencoder_starts_as_maes_release
- nn.init.normal_(self.mask_token, std=0.02)
+ nn.init.normal_(self.mask_token)

common.py tests/test_magma.py::test_a_masked_autoencoder_starts_as_maes_release
- nn.init.xavier_uniform_(module.weight)
+ nn.init.xavier_normal_(module.weight)

common.py tests/test_magma.py::test_a_masked_autoencoder_starts_as_maes_release
- module.apply(initialize)
+ pass

common.py tests/test_magma.py::test_a_masked_autoencoder_starts_as_maes_release
- self.decoder_norm = nn.LayerNorm(decoder_dim, eps=1e-6)
+ self.decoder_norm = nn.LayerNorm(decoder_dim)

common.py tests/test_mobile_former.py::test_weights_start_as_in_the_released_network
- nn.init.normal_(self.tokens)
+ nn.init.normal_(self.tokens, std=0.02)

ebm_pretrain.py tests/test_ebm_pretrain.py::test_small_and_large_patches_hide_about_the_same_share
- random_patches(clean, 75, 0.01, 0.025)
+ random_patches(clean, 25, 0.01, 0.025)

ebm_pretrain.py tests/test_ebm_pretrain.py::test_backbones_start_as_published
- nn.Parameter(torch.full((dim,), 1e-6))
+ nn.Parameter(torch.full((dim,), 1.0))

ebm_pretrain.py tests/test_ebm_pretrain.py::test_backbones_start_as_published
- nn.init.trunc_normal_(module.weight, std=0.02)
+ pass

ebm_pretrain.py tests/test_ebm_pretrain.py::test_backbones_start_as_published
- nn.init.zeros_(module.bias)
+ pass

ebm_pretrain.py tests/test_ebm_pretrain.py::test_the_first_step_has_its_size_before_alpha_is_set
- nn.Parameter(torch.tensor(0.0))
+ nn.Parameter(torch.tensor(0.5))

ebm_pretrain.py tests/test_ebm_pretrain.py::test_the_first_step_has_its_size_before_alpha_is_set
- first_step: float = 0.3
+ first_step: float = 0.03

ebm_pretrain.py tests/test_ebm_pretrain.py::test_captions_stand_over_what_they_name
- _, corrupted = self.corrupt(images, task)
-             columns
+ _, corrupted = self.corrupt(images)
+             columns

ebm_pretrain.py tests/test_ebm_pretrain.py::test_captions_stand_over_what_they_name
- columns += [corrupted, *self.restored(corrupted)]
+ columns += [*self.restored(corrupted), corrupted]

common.py tests/test_golden.py::test_ours_equals_the_official_number
- self.norm1 = nn.LayerNorm(dim, eps=1e-6)
+ self.norm1 = nn.LayerNorm(dim, eps=2e-6)

common.py tests/test_golden.py::test_ours_equals_the_official_number
- self.norm = nn.LayerNorm(dim, eps=1e-6)
+ self.norm = nn.LayerNorm(dim, eps=2e-6)

common.py tests/test_golden.py::test_ours_equals_the_official_number
- nn.LayerNorm(decoder_dim, eps=1e-6)
+ nn.LayerNorm(decoder_dim, eps=2e-6)

common.py tests/test_golden.py::test_ours_equals_the_official_number
- (patches.shape[-1] - 1) + 1e-6).sqrt()
+ (patches.shape[-1] - 1)).sqrt() + 1e-6

common.py tests/test_golden.py::test_float64_keeps_its_digits_forwards_and_backwards
- torch.promote_types(prediction.dtype, torch.float32)
+ torch.float32

common.py tests/test_golden.py::test_half_precisions_are_computed_in_float32
- (prediction.to(dtype) - target.to(dtype))
+ (prediction - target)

finola.py tests/test_golden.py::test_float64_keeps_its_digits_forwards_and_backwards
- torch.promote_types(images.dtype, torch.float32)
+ torch.float32

magma.py tests/test_golden.py::test_ours_equals_the_official_number
- / (pairs - 1).clamp_min(1)
+ / pairs.clamp_min(1)

magma.py tests/test_golden.py::test_ours_equals_the_official_number
- b: Tensor, weights: tuple = (25.0, 25.0, 1.0)
+ b: Tensor, weights: tuple = (25.0, 25.0, 1.5)

magma.py tests/test_golden.py::test_ours_equals_the_official_number
- - 1) + 1e-4).sqrt()
+ - 1) + 1e-5).sqrt()

mlo_mae.py tests/test_golden.py::test_ours_equals_the_official_number
- self.fc2(F.relu(self.fc1(
+ self.fc2(F.gelu(self.fc1(

protocols/augment.py tests/test_golden.py::test_ours_equals_the_official_number
- torch.deg2rad(3 * level)
+ torch.deg2rad(3.01 * level)

protocols/augment.py tests/test_golden.py::test_ours_equals_the_official_number
- affine(b=0.03 * level)
+ affine(b=0.0301 * level)

protocols/augment.py tests/test_golden.py::test_ours_equals_the_official_number
- affine(d=0.03 * level)
+ affine(d=0.0301 * level)

protocols/augment.py tests/test_golden.py::test_ours_equals_the_official_number
- 0.045 * level * images.shape[-1]
+ 0.0451 * level * images.shape[-1]

protocols/augment.py tests/test_golden.py::test_ours_equals_the_official_number
- 0.045 * level * images.shape[-2]
+ 0.0451 * level * images.shape[-2]

protocols/augment.py tests/test_golden.py::test_ours_equals_the_official_number
- (1 + 0.09 * level)
+ (1 + 0.0901 * level)

protocols/augment.py tests/test_golden.py::test_ours_equals_the_official_number
- [0.299, 0.587, 0.114]
+ [0.3, 0.587, 0.113]

protocols/heads.py tests/test_golden.py::test_ours_equals_the_official_number
- weight_decay: float = 0.0, momentum: float = 0.9)
+ weight_decay: float = 0.0, momentum: float = 0.95)

ebm_pretrain.py tests/test_ebm_pretrain.py::test_the_probe_restores_a_tenth_of_the_images_that_it_takes
- max(1, (config.probe_images or 20_000) // 10)
+ max(1, config.probe_images // 10)

ebm_pretrain.py tests/test_ebm_pretrain.py::test_the_first_step_has_its_size_before_alpha_is_set
- alpha_lr: float = 1.0
+ alpha_lr: float = 10.0

finola.py tests/test_finola_figures.py::test_what_the_analysis_measures
- torch.full((len(images), 2), self.size // 4
+ torch.full((len(images), 2), 0

finola.py tests/test_finola_figures.py::test_what_the_analysis_measures
- (self.size // 4 + self.size // 2 // 2,) * 2
+ (self.size // 2,) * 2

protocols/finola_figures.py tests/test_finola_figures.py::test_what_cannot_be_measured_is_said
- "Eq. 2, 4 and 5" if "laplacian" in residuals else "Eq. 2"
+ "Eq. 2 and 4"

protocols/energy_figures.py tests/test_energy_figures.py::test_the_sheets_show_the_chain_of_each_task_step_by_step
- CHAIN = 8
+ CHAIN = 4

protocols/frozen.py tests/test_frozen.py::test_all_training_images_may_vote_and_no_more
- if config.k > len(bank):
+ if config.k > len(bank) + 1:

protocols/training.py
  tests/test_training.py::test_a_run_is_told_by_what_it_starts_from_and_goes_on_whatever_else_is_asked
- {name: getattr(Config, name) for name in OUTSIDE}
+ {}

protocols/training.py
  tests/test_training.py::test_a_run_is_told_by_what_it_starts_from_and_goes_on_whatever_else_is_asked
- digest(encoder) + digest(head)
+ digest(encoder)

protocols/training.py
  tests/test_training.py::test_a_run_is_told_by_what_it_starts_from_and_goes_on_whatever_else_is_asked
- if subject.name == "trained" else f"{name}-{subject.name}")
+ if subject.name == "trained" else name)

protocols/training.py tests/test_training.py::test_the_accuracy_is_computed_in_the_precision_of_the_training
- with autocast(config.amp, images.device):
+ with autocast("off", images.device):

protocols/rows.py tests/test_frozen.py::test_features_are_the_encoders_own_in_the_precision_of_the_settings
- config.pool or self.own_pool
+ config.pool or "mean"

protocols/rows.py tests/test_frozen.py::test_features_are_the_encoders_own_in_the_precision_of_the_settings
- with autocast(config.amp, images.device):
+ with autocast("off", images.device):

protocols/rows.py tests/test_frozen.py::test_eight_classes_at_most_are_drawn_and_without_any_the_first_eight
- if len(self.test.classes) else torch.arange(len(self.test))
+ if True else torch.arange(len(self.test))

protocols/settings.py tests/test_frozen.py::test_all_training_images_may_vote_and_no_more
- k: int = 10
+ k: int = 20

protocols/training.py tests/test_training.py::test_heads_start_as_in_maes_release
- subject.use_pool(config)
+ pass

ebm_pretrain.py tests/test_ebm_pretrain.py::test_backbones_start_as_published
- ChannelNorm(self.dim, eps=1e-6)
+ ChannelNorm(self.dim)

protocols/finola_figures.py
  tests/test_finola_figures.py::test_of_many_channels_256_bend_most_and_some_components_are_shown
- descending=True).values[:, :256]
+ descending=True).values

protocols/finola_figures.py
  tests/test_finola_figures.py::test_of_many_channels_256_bend_most_and_some_components_are_shown
- COMPONENTS = (1, 4, 16, 64, 192, 768)
+ COMPONENTS = (1, 4, 16, 64, 384, 768)

protocols/finola_figures.py tests/test_finola_figures.py::test_what_cannot_be_measured_is_said
- print("note: masked_b has
+ str("note: masked_b has

common.py tests/test_mobile_former.py::test_a_finer_map_comes_from_as_many_blocks_without_the_last_two_halvings
- row[0] in ("stem", "down")
+ row[0] in ("down",)

finola.py tests/test_finola.py::test_a_finer_map_keeps_everything_in_its_place
- cut(images, self.cell * corner, self.config.image_size // 2)
+ cut(images, 16 * corner, self.config.image_size // 2)

finola.py tests/test_finola.py::test_a_finer_map_keeps_everything_in_its_place
- self.linear = nn.Linear(dim, 3 * cell**2)
+ self.linear = nn.Linear(dim, 3 * 16**2)

finola.py tests/test_finola.py::test_the_upsampler_matches_the_layers_written_out
- rows = rows[-int(math.log2(cell)) :]
+ rows = rows[: int(math.log2(cell))]

finola.py tests/test_finola.py::test_finola_refuses_what_makes_no_sense
- common.STRIDES[self.width] * (1 if
+ 16 * (1 if

finola.py tests/test_finola.py::test_a_frozen_encoder_is_kept_while_the_rest_learns
- self.encoder.eval()  # its norms keep
+ pass  # its norms keep

finola.py tests/test_finola.py::test_a_frozen_encoder_is_kept_while_the_rest_learns
- self.encoder.requires_grad_(not config.freeze_encoder)
+ pass

protocols/finola_figures.py tests/test_finola_figures.py::test_what_the_analysis_measures
- bent = (z, method.encoder(images).float())
+ bent = (z, z)

protocols/finola_figures.py
  tests/test_finola_figures.py::test_the_surfaces_are_the_channels_that_bend_most_each_in_its_own_range
- method.middle(images)).float(), method.encoder(images).float())
+ method.middle(images)).float(),) * 2

protocols/finola_figures.py tests/test_finola_figures.py::test_what_cannot_be_measured_is_said
- if residuals and "laplacian" not in residuals:
+ if residuals:

protocols/finola_figures.py tests/test_finola_figures.py::test_what_the_analysis_measures
- ring(*method.place) <= 1
+ ring(*method.place) <= 2

protocols/finola_figures.py tests/test_finola_figures.py::test_what_the_analysis_measures
- (ring(block, block) - size // 2 / 2).abs() < 1
+ (ring(middle, middle) - size // 2 / 2).abs() < 1

protocols/finola_figures.py tests/test_finola_figures.py::test_what_the_analysis_measures
- ring(middle, middle) > middle - 2
+ ring(middle, middle) > middle - 1

protocols/finola_figures.py tests/test_finola_figures.py::test_the_table_has_means_of_psnr_and_medians_of_the_rest
- 100 * float(found[name].mean())
+ 100 * float(found[name].median())

plumbing/crops.py tests/test_crops.py::test_bicubic_crops_are_those_of_pillow_and_of_torch
- (1.5 * x - 2.5) * x**2 + 1
+ (1.25 * x - 2.25) * x**2 + 1

plumbing/crops.py tests/test_crops.py::test_bicubic_crops_are_those_of_pillow_and_of_torch
- x = x if most is None else x.clamp(0, most)
+ x = x

plumbing/crops.py tests/test_crops.py::test_a_box_that_does_not_fit_is_cut_to_the_image
- h, w = torch.minimum(h, height[:, None]), torch.minimum(w, width[:, None])
+ h, w = torch.minimum(h, height[:, None]), w

plumbing/crops.py tests/test_images.py::test_crops_of_memory_and_of_files_are_made_as_the_settings_say
- crop_boxes(*sides, scale, ratio, generator, clamp)
+ crop_boxes(*sides, scale, ratio, generator)

plumbing/decoding.py tests/test_images.py::test_crops_of_memory_and_of_files_are_made_as_the_settings_say
- (interpolation or "bicubic")
+ (interpolation or "bilinear")

plumbing/images.py tests/test_images.py::test_crops_of_memory_and_of_files_are_made_as_the_settings_say
- decode_image(self.paths[index], self.size, self.crop,
+ decode_image(self.paths[index], self.size, self.crop[:2],

plumbing/settings.py tests/test_images.py::test_padded_crops_are_not_resized_so_they_have_no_interpolation
- if self.interpolation and self.crop_pad:
+ if False:

protocols/settings.py tests/test_dense_protocols.py::test_flags_that_have_no_effect_are_told_in_a_line
- config.map != "tsne"
+ config.map == "tsne"

magma.py tests/test_settings.py::test_notes_tell_what_moved_and_what_cannot_take_effect
- self.shuffle_graph and "--shuffle
+ False and "--shuffle

protocols/settings.py tests/test_recipes.py::test_what_maes_code_does_besides_is_off_unless_asked_for
- found._replace(clamp=self.crop_clamp)
+ found

plumbing/run_files.py tests/test_recipes.py::test_what_maes_code_does_besides_is_off_unless_asked_for
- "crop_clamp": False, "positions": "fixed", "fc_norm": False}
+ "crop_clamp": False, "positions": "fixed"}

common.py tests/test_common.py::test_learned_positions_decay_as_tokens_do
- ("token", "tokens", "positions", "bias")
+ ("token", "tokens", "bias")

common.py tests/test_common.py::test_learned_positions_start_as_timms_and_change_no_other_weight
- nn.Parameter(nn.init.trunc_normal_(self.positions, std=0.02))
+ nn.Parameter(self.positions)

common.py tests/test_encoders.py::test_learned_positions_are_saved_and_have_one_size_of_images
- self.fields["learned_positions"] = True
+ pass

magma.py tests/test_magma.py::test_positions_are_learned_where_the_settings_say
- "learned_positions": config.positions == "learned"}
+ "learned_positions": False}

plumbing/encoders.py tests/test_export.py::test_learned_positions_are_exported_by_timms_name_alone
- weights.pop("positions", None)
+ pass

plumbing/start.py tests/test_start.py::test_timms_learned_positions_start_an_encoder_that_learns_them_and_no_other
- "cls_token": cls + table[:, :1]}
+ "cls_token": cls}

protocols/training.py tests/test_training.py::test_finetuning_learns_positions_from_where_they_are
- encoder.state_dict() | {"positions": encoder.positions.detach()}
+ encoder.state_dict() | {"positions": found.positions.detach()}

protocols/heads.py tests/test_training.py::test_fc_norm_takes_the_mean_before_a_new_norm
- return outputs[-1][:, 1:].mean(dim=1)
+ return encoder.norm(outputs[-1])[:, 1:].mean(dim=1)

protocols/training.py tests/test_training.py::test_fc_norm_takes_the_mean_before_a_new_norm
- encoder.norm.requires_grad_(False)
+ pass

protocols/tsne.py tests/test_tsne.py::test_each_row_has_the_entropy_of_its_perplexity
- too_wide, high, middle)
+ too_wide, middle, high)

protocols/tsne.py tests/test_tsne.py::test_each_row_has_the_entropy_of_its_perplexity
- d = d / d.masked_fill(itself, 0).mean(dim=1, keepdim=True).clamp_min(torch.finfo(d.dtype).tiny)
+ d = d / 1

protocols/tsne.py tests/test_tsne.py::test_points_at_one_place_share_a_row_alike
- torch.full_like(low, 60)
+ torch.full_like(low, 2)

protocols/tsne.py tests/test_tsne.py::test_eq_5_is_the_gradient_of_the_divergence
- pull = (p - q) * weights
+ pull = (p - q) * weights.sqrt()

protocols/tsne.py tests/test_tsne.py::test_the_divergence_matches_the_loop_over_pairs
- torch.addmm(1 + norms,
+ torch.addmm(2 + norms,

protocols/tsne.py tests/test_tsne.py::test_the_walk_is_algorithm_1
- p * EXAGGERATION if step < EXAGGERATED
+ p * EXAGGERATION if step <= EXAGGERATED

protocols/tsne.py tests/test_tsne.py::test_the_walk_is_algorithm_1
- slope.sign() == velocity.sign()
+ slope.sign() != velocity.sign()

protocols/tsne.py tests/test_tsne.py::test_the_walk_is_algorithm_1
- if step < EARLY else
+ if step <= EARLY else

protocols/tsne.py tests/test_tsne.py::test_the_walk_is_algorithm_1
- min(LEARNING_RATE, len(y))
+ len(y)

protocols/tsne.py tests/test_tsne.py::test_few_points_have_a_third_of_their_neighbours_for_perplexity
- (len(x) - 1) / 3
+ len(x) / 3

protocols/tsne.py tests/test_tsne.py::test_odd_features_have_points_too
- x = features.double() - features.double().mean(dim=0)
+ x = features - features.mean(dim=0)

protocols/tsne.py tests/test_tsne.py::test_odd_features_have_points_too
- if len(features) < 2:
+ if len(features) < 1:

protocols/figures.py tests/test_figures.py::test_the_feature_map_has_the_points_that_it_is_given
- manual_seed(0))[:most]
+ manual_seed(0))[: most + 1]

protocols/figures.py tests/test_figures.py::test_the_feature_map_has_the_points_that_it_is_given
- torch.randperm(len(chosen), generator=torch.Generator().manual_seed(0))[:most]
+ torch.randperm(len(chosen))[:most]

protocols/figures.py tests/test_figures.py::test_the_feature_map_has_the_points_that_it_is_given
- features, labels = features.cpu()[chosen], labels.cpu()[chosen]
+ features, labels = features.cpu()[chosen], labels.cpu()[chosen.sort().values]

protocols/figures.py tests/test_figures.py::test_the_map_by_tsne_stands_beside_the_components
- functools.partial(tsne, seed=config.seed, perplexity=config.perplexity)
+ functools.partial(tsne, seed=config.seed)

protocols/figures.py tests/test_figures.py::test_features_that_are_not_finite_have_no_map
- if reason := unfit(test=features):
+ if reason := "":

protocols/detection.py tests/test_detection.py::test_match_finds_what_trying_all_pairs_finds
- of_column[seen] -= reached - length[seen]
+ of_column[seen] -= length[seen]

protocols/detection.py tests/test_detection.py::test_match_takes_any_kind_of_matrix
- cost * 2.0**-64 if
+ cost if

protocols/detection.py tests/test_detection.py::test_match_refuses_what_is_not_finite
- if not np.isfinite(cost).all():
+ if np.isnan(cost).all():

protocols/detection.py tests/test_detection.py::test_match_takes_any_kind_of_matrix
- detach().to("cpu", torch.float64))
+ detach().to("cpu", torch.float32))

protocols/detection.py tests/test_detection.py::test_generalized_iou_of_boxes_that_touch_and_have_no_area
- .clamp_min(0).prod(dim=-1)
+ .prod(dim=-1).clamp_min(0)

protocols/detection.py tests/test_detection.py::test_generalized_iou_of_boxes_that_touch_and_have_no_area
- / hull.clamp_min(1e-7)
+ / hull

protocols/detection.py tests/test_detection.py::test_generalized_iou_broadcasts_and_has_the_right_gradient
- dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)  # areas leave half precision
+ dtype = a.dtype

protocols/detection.py tests/test_detection.py::test_average_precision_keeps_ties_with_a_threshold
- THRESHOLDS = np.linspace(0.5, 0.95, 10)
+ THRESHOLDS = np.linspace(0.5, 0.95, 10, dtype=np.float32)

protocols/detection.py tests/test_detection.py::test_average_precision_at_recalls_that_are_rounded
- RECALLS = np.linspace(0, 1, 101)
+ RECALLS = np.arange(101) / 100

protocols/detection.py tests/test_detection.py::test_average_precision_gives_equal_overlaps_to_the_later_truth
- best = len(aside) - 1 - np.where(choice, row, -1)[:, ::-1].argmax(axis=1)
+ best = np.where(choice, row, -1).argmax(axis=1)

protocols/detection.py tests/test_detection.py::test_average_precision_keeps_the_order_of_equal_scores
- order = np.argsort(-scores, kind="stable")
+ order = np.argsort(scores, kind="stable")[::-1]

protocols/detection.py tests/test_detection.py::test_average_precision_sizes_truths_by_their_area
- ignored | (~hit & other)
+ ignored

protocols/detection.py tests/test_detection.py::test_average_precision_sizes_truths_by_their_area
- (area < low) | (area > high)
+ (area < low) | (area >= high)

protocols/detection.py tests/test_detection.py::test_average_precision_leaves_crowds_out
- fits = (row >= least) & ~(taken & ~crowd)
+ fits = (row >= least) & ~taken

protocols/detection.py tests/test_detection.py::test_average_precision_leaves_crowds_out
- np.where(crowd[None], own, own + other - shared)
+ own + other - shared

protocols/detection.py tests/test_detection.py::test_average_precision_takes_the_best_hundred_of_a_class
- kind="stable")][:MOST]
+ kind="stable")]

protocols/detection.py tests/test_detection.py::test_average_precision_matches_a_literal_loop
- choice = np.where(counts.any(axis=1, keepdims=True), counts, fits)
+ choice = fits

protocols/detection.py tests/test_detection.py::test_average_precision_matches_a_literal_loop
- precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
+ precision = precision

plumbing/coco.py tests/test_coco.py::test_a_polygon_has_the_pixels_that_pycocotools_gives_it
- column = (np.minimum(x0, x1) + 0.5) / 5 - 0.5
+ column = np.minimum(x0, x1) / 5

plumbing/coco.py tests/test_coco.py::test_a_polygon_of_slanted_sides_is_cut_at_the_picture
- / max(length, 1)
+ / (length + 1)

plumbing/coco.py tests/test_coco.py::test_runs_go_down_the_columns
- np.repeat(values, counts).reshape(width, height).T
+ np.repeat(values, counts).reshape(height, width)

plumbing/coco.py tests/test_coco.py::test_runs_go_down_the_columns
- counts.append(value + (counts[-2] if len(counts) > 2 else 0))
+ counts.append(value)

plumbing/coco.py tests/test_coco.py::test_runs_that_do_not_fill_the_picture_are_refused
- or sum(counts) != height * width:
+ or sum(counts) > height * width:

plumbing/coco.py tests/test_coco.py::test_a_segmentation_is_polygons_or_runs
- mask |= polygon_mask(polygon, height, width)
+ mask ^= polygon_mask(polygon, height, width)

plumbing/coco.py tests/test_coco.py::test_a_folder_is_read_in_the_order_of_its_ids
- {number: i for i, number in enumerate(sorted(by_id["categories"]))}
+ {number: i for i, number in enumerate(by_id["categories"])}

plumbing/coco.py tests/test_coco.py::test_a_folder_is_read_in_the_order_of_its_ids
- {number: [] for number in sorted(images)}, set()
+ {number: [] for number in images}, set()

plumbing/coco.py tests/test_coco.py::test_boxes_are_cut_to_the_picture
- .clip(0, [width, height, width, height])
+ .clip(0, [height, width, height, width])

plumbing/coco.py tests/test_coco.py::test_masks_and_classes_of_pixels
- key=lambda n: (not objects.crowd[n], -masks[n].sum())
+ key=lambda n: (not objects.crowd[n], masks[n].sum())

plumbing/coco.py tests/test_coco.py::test_masks_and_classes_of_pixels
- key=lambda n: (not objects.crowd[n], -masks[n].sum())
+ key=lambda n: (not objects.crowd[n], -masks[n].sum(), -n)

plumbing/coco.py tests/test_coco.py::test_a_polygon_has_the_pixels_that_pycocotools_gives_it
- np.add.at(turns, (row, column - first), 1)
+ turns[row, column - first] += 1

plumbing/coco.py tests/test_dense_protocols.py::test_masks_of_coco_are_class_maps
- found[masks[n]] = 255 if objects.crowd[n] else objects.labels[n] + 1
+ found[masks[n]] = objects.labels[n] + 1

plumbing/coco.py tests/test_dense_protocols.py::test_objects_without_a_mask_have_their_box_and_it_is_told
- boxes = cut_boxes(self.objects[i].boxes, height, width)[0]
+ boxes = self.objects[i].boxes

plumbing/coco.py tests/test_dense_protocols.py::test_objects_without_a_mask_have_their_box_and_it_is_told
- if any(bare):
+ if all(not x for x in bare):

plumbing/coco.py tests/test_dense_protocols.py::test_a_mask_that_cannot_be_drawn_is_one_line_before_any_training
- all(is_number(x) and abs(x) <= LONGEST_SIDE for x in polygon)
+ all(is_number(x) for x in polygon)

plumbing/coco.py tests/test_dense_protocols.py::test_a_mask_that_cannot_be_drawn_is_one_line_before_any_training
- if masks and segmentation:
+ if False:

plumbing/coco.py tests/test_dense_protocols.py::test_what_is_no_segmentation_of_coco_is_refused
- for n in np.flatnonzero(~x.crowd)]
+ for n in range(len(x))]

plumbing/dense.py tests/test_dense_protocols.py::test_masks_of_coco_are_class_maps
- if name == "coco" or is_coco(home):
+ if name == "coco":

plumbing/dense.py tests/test_dense_protocols.py::test_what_is_no_segmentation_of_coco_is_refused
- if len(names) > IGNORED or len(set(names)) < len(names):
+ if len(set(names)) < len(names):

plumbing/dense.py tests/test_dense_protocols.py::test_what_is_no_segmentation_of_coco_is_refused
- *map(printable, data.classes)], first=0)
+ *map(printable, data.classes)])

plumbing/dense.py tests/test_dense_protocols.py::test_a_picture_on_its_side_has_the_masks_of_either_way
- image = upright if upright.size == (width, height) else image
+ image = upright

protocols/segmentation.py tests/test_dense_protocols.py::test_the_command_segments_coco_and_goes_on
- if test != train:
+ if len(test) != len(train):

plumbing/processes.py tests/test_processes.py::test_two_processes_hear_the_same_result_mistake_mean_and_number
- raise OtherProcessFailed(f"process {number} failed: {reason}")
+ raise OtherProcessFailed(f"process 0 failed: {reason}")

plumbing/processes.py tests/test_dense_protocols.py::test_two_processes_detect_as_one_does
- dist.broadcast(shared, 0)
+ dist.all_reduce(shared)

protocols/detect.py tests/test_dense_protocols.py::test_two_processes_detect_as_one_does
- *weights, truths = average(counts)
+ *weights, truths = counts

protocols/detect.py tests/test_dense_protocols.py::test_two_processes_detect_as_one_does
- found[i % parts][i // parts] for i
+ sum(found, [])[i] for i

protocols/detect.py tests/test_dense_protocols.py::test_two_processes_detect_as_one_does
- if None in found:
+ if found[0] is None:

protocols/detect.py tests/test_dense_protocols.py::test_two_processes_detect_as_one_does
- test.plain_batches(mine, config.image_size) if mine else ():
+ test.plain_batches(mine, config.image_size):

protocols/detect.py tests/test_dense_protocols.py::test_two_processes_detect_as_one_does
- broadcast_buffers(self)
+ pass

plumbing/runs.py tests/test_dense_protocols.py::test_detection_goes_on_to_the_weights_of_one_that_was_not_stopped
- stepper.optimizer.load_state_dict(state["optimizer"])
+ pass

protocols/settings.py tests/test_dense_protocols.py::test_flags_that_have_no_effect_are_told_in_a_line
- if given.get(x, getattr(Config, x)) != getattr(Config, x)):
+ if x in given):

protocols/settings.py tests/test_dense_protocols.py::test_flags_that_have_no_effect_are_told_in_a_line
- and not config.finetune:
+ :

protocols/settings.py tests/test_dense_protocols.py::test_flags_that_have_no_effect_are_told_in_a_line
- ("batchnorm",) if config.head == "pyramid" else ("dropout", "aux_weight")
+ ("batchnorm", "dropout", "aux_weight")

protocols/settings.py tests/test_dense_protocols.py::test_flags_that_have_no_effect_are_told_in_a_line
- if protocol in DENSE_PROTOCOLS and not
+ if protocol in RECIPES and not

protocols/settings.py tests/test_dense_protocols.py::test_flags_that_have_no_effect_are_told_in_a_line
- "relatives": ("pool", "k", "metric", "vote")
+ "relatives": ("pool", "metric", "vote")

protocols/dense.py tests/test_dense_protocols.py::test_flags_of_detection_that_an_encoder_leaves_idle_are_told
- if config.head != "plain":
+ if True:

protocols/dense.py tests/test_dense_protocols.py::test_flags_of_detection_that_an_encoder_leaves_idle_are_told
- encoder.image_sides and config.data != "scenes"
+ config.data != "scenes"

protocols/dense.py tests/test_dense_protocols.py::test_flags_of_detection_that_an_encoder_leaves_idle_are_told
- encoder.image_sides and config.data != "scenes"
+ encoder.image_sides

protocols/dense.py tests/test_dense_protocols.py::test_flags_of_detection_that_an_encoder_leaves_idle_are_told
- config, idle = fitting(encoder, config), {}
+ config, idle = fitting(encoder, config), {}; return config

protocols/compare.py tests/test_compare.py::test_a_protocol_that_trains_is_refused_before_the_first_run_where_one_has_it
- rows["untrained"] = given.get("untrained") or given.get("scratch")
+ rows["untrained"] = given.get("untrained")

protocols/compare.py tests/test_compare.py::test_a_protocol_that_trains_is_refused_before_the_first_run_where_one_has_it
- rows, found = {"trained": True, "pixels": given.get("pixels")}, []
+ rows, found = {"trained": True}, []

protocols/compare.py tests/test_compare.py::test_a_protocol_that_trains_is_refused_before_the_first_run_where_one_has_it
- config = Config(**recipe | given |
+ config = Config(**given |

protocols/compare.py tests/test_compare.py::test_a_folder_that_a_protocol_starts_from_is_not_in_its_way
- if applies(protocol, subject, config) and trains_on_images(protocol, subject, config):
+ if trains_on_images(protocol, subject, config):

plumbing/coco.py tests/test_coco.py::test_a_file_that_is_wrong_is_refused_in_one_line
- or ".." in parts.parts or
+ or

plumbing/coco.py tests/test_coco.py::test_a_file_that_is_wrong_is_refused_in_one_line
- with suppress(UnicodeEncodeError):
+ with suppress(KeyError):

plumbing/coco.py tests/test_coco.py::test_a_file_that_is_wrong_is_refused_in_one_line
- and abs(x) < 1e15
+ and x - x == 0.0

plumbing/coco.py tests/test_coco.py::test_pictures_of_another_size_than_their_annotations_are_refused_or_left_out
- and not (turned and data.sizes[i] == (width, height))
+ and data.sizes[i] != (width, height)

plumbing/coco.py tests/test_coco.py::test_pictures_of_another_size_than_their_annotations_are_refused_or_left_out
- write(json.dumps(list(bad)).encode())
+ write(b"[]")

plumbing/coco.py tests/test_coco.py::test_crowds_alone_are_nothing_to_find
- cut_boxes(x.boxes, *size)[1][~x.crowd]
+ cut_boxes(x.boxes, *size)[1]

plumbing/coco.py tests/test_coco.py::test_a_folder_is_read_in_the_order_of_its_ids
- if split == "test" else "these do not train"
+ if split == "none" else "these do not train"

ebm_pretrain.py tests/test_ebm_pretrain.py::test_one_step_is_in_memory_at_a_time
- if config.objective != "energy" or not config.steps:
+ if True:

ebm_pretrain.py tests/test_ebm_pretrain.py::test_step_by_step_is_the_gradient_of_the_whole_loss
- stepper.backward(out["loss"] / count)
+ stepper.backward(out["loss"] / len(batches))

ebm_pretrain.py tests/test_ebm_pretrain.py::test_step_by_step_is_the_gradient_of_the_whole_loss
- chain=(clean, corrupted, reached))
+ chain=(clean, corrupted, corrupted))

ebm_pretrain.py tests/test_ebm_pretrain.py::test_step_by_step_is_the_gradient_of_the_whole_loss
- loss + out["loss"].detach() / config.steps
+ loss + out["loss"].detach()

ebm_pretrain.py tests/test_ebm_pretrain.py::test_two_processes_have_the_step_size_and_the_gradients_of_one
- waits = pending and model is not self
+ waits = False and model is not self

ebm_pretrain.py tests/test_ebm_pretrain.py::test_two_processes_have_the_step_size_and_the_gradients_of_one
- with model.no_sync() if waits else
+ with model.no_sync() if model is not self else

mlo_mae.py tests/test_mlo_mae.py::test_the_last_block_computes_the_cls_token_alone
- F.linear(normed, weight[dim:], bias[dim:])
+ F.linear(x, weight[dim:], bias[dim:])

mlo_mae.py tests/test_mlo_mae.py::test_the_last_block_computes_the_cls_token_alone
- x = x[:, :1] + block.attn
+ x = x[:, -1:] + block.attn

mlo_mae.py tests/test_mlo_mae.py::test_the_hypergradient_goes_back_through_level_twos_own_features
- keep=bool(validation)
+ keep=False

mlo_mae.py tests/test_mlo_mae.py::test_the_hypergradient_goes_back_through_level_twos_own_features
- and stepper.dtype != torch.float16
+

mlo_mae.py tests/test_mlo_mae.py::test_the_forward_product_takes_plain_attention
- with PlainAttention():
+ with torch.enable_grad():

mlo_mae.py tests/test_mlo_mae.py::test_a_cycle_gives_the_masks_the_derivative_of_all_its_steps
- level_2, level_3 = loss_of(2, training, {}, features)
+ level_2, level_3 = loss_of(2, training, {}, features.detach() if features is not None else None)

plumbing/scenes.py tests/test_dense.py::test_a_scene_shows_one_to_five_objects_each_of_them_in_part
- max(3, size**2 / 400)
+ 1

plumbing/scenes.py tests/test_dense.py::test_a_scene_shows_one_to_five_objects_each_of_them_in_part
- labels[here, number - 1] = kind[good]
+ labels[here, j] = kind[good]

plumbing/scenes.py tests/test_dense.py::test_later_objects_lie_before_earlier_ones_and_hidden_ones_are_left_out
- number[:, None, None].to(torch.uint8), instances[here])
+ torch.where(instances[here] > 0, instances[here], number[:, None, None].to(torch.uint8)), instances[here])

plumbing/scenes.py tests/test_dense.py::test_scenes_are_the_same_drawing_at_any_size
- brush.vary(-0.65, 0.65), brush.vary(-0.65, 0.65)
+ brush.vary(-0.65, 0.65), brush.vary(-0.65, 0.65 - 4 / size)

plumbing/dense.py tests/test_dense.py::test_a_class_map_is_the_class_of_the_object_that_is_seen
- objects + 1], dim=1)
+ objects], dim=1)

plumbing/dense.py tests/test_dense.py::test_nearest_pixels_are_those_that_centres_lie_in
- centre.floor().long()
+ centre.round().long()

plumbing/dense.py tests/test_dense.py::test_crops_move_pictures_and_labels_alike
- nearest_pixels(*window, side, size) for
+ nearest_pixels(window[0].minimum(sum(window)), window[1].abs(), side, size) for

plumbing/dense.py tests/test_dense.py::test_folders_give_pictures_and_labels_that_fit_each_other
- labels.flip(-1), labels).long()
+ labels, labels).long()

plumbing/dense.py tests/test_dense.py::test_labels_are_the_numbers_of_the_file
- labels[labels == 65535] = IGNORED
+ labels[labels == 65535] = 0

plumbing/dense.py tests/test_dense.py::test_labels_are_the_numbers_of_the_file
- np.where((labels == 0) | (labels == IGNORED), IGNORED, labels - 1)
+ np.where(labels == 0, IGNORED, labels - 1)

plumbing/dense.py tests/test_dense.py::test_what_holds_no_labels_is_refused
- if depth < 8 and
+ if depth < 4 and

plumbing/dense.py tests/test_dense.py::test_bad_folders_are_one_line_with_the_file
- if own.shape != (height, width):
+ if own.size != height * width:

plumbing/dense.py tests/test_dense.py::test_bad_folders_are_one_line_with_the_file
- and x > most}
+ and x > most + 1}

plumbing/dense.py tests/test_dense.py::test_a_folder_without_parts_holds_some_out_and_may_name_classes
- in aside) == tests
+ in aside) != tests

plumbing/dense.py tests/test_dense.py::test_bad_folders_are_one_line_with_the_file
- [labels[i] for i in good]
+ labels[: len(good)]

protocols/settings.py tests/test_segmentation.py::test_flags_that_such_a_protocol_does_not_use_are_refused
- UNUSED += ("positions", "fc_norm", "smoothing",
+ UNUSED += ("positions", "fc_norm",

protocols/settings.py tests/test_segmentation.py::test_flags_that_such_a_protocol_does_not_use_are_refused
- and given.get("data") != "scenes":
+ and not given.get("data"):

protocols/settings.py tests/test_segmentation.py::test_flags_that_such_a_protocol_does_not_use_are_refused
- if field in unused and given[field] != getattr(Config, field)]
+ if field in unused]

protocols/heads.py tests/test_segmentation.py::test_weight_decay_falls_on_what_is_asked_for
- return layer_groups(None, head, 1.0, config.weight_decay, config.decay_on)
+ return layer_groups(None, head, 1.0, config.weight_decay)

protocols/settings.py tests/test_segmentation.py::test_max_steps_claims_no_part_of_the_pictures_where_all_are_judged
- return "linear" in self.protocol and self.cache
+ return True

protocols/run_folders.py tests/test_evaluate.py::test_notes_name_only_flags_that_would_add_something
- linear, clusters and segment alone
+ linear and clusters alone

protocols/compare.py tests/test_compare.py::test_a_protocol_that_trains_is_refused_before_the_first_run_where_one_has_it
- exists; add --resume to go on with it"
+ exists; add --resume to go on with it, or choose another folder by --out"

plumbing/dense.py tests/test_dense.py::test_names_of_classes_are_told_apart_and_fit_their_labels
- name if names.count(name) == 1 else f"{name} {i}".strip()
+ name

plumbing/dense.py tests/test_dense.py::test_names_of_classes_are_told_apart_and_fit_their_labels
- if "" in names:
+ if False:

plumbing/dense.py tests/test_dense.py::test_names_of_classes_are_told_apart_and_fit_their_labels
- encoding="utf-8-sig", errors
+ encoding="utf-8", errors

plumbing/dense.py tests/test_dense.py::test_names_of_classes_are_told_apart_and_fit_their_labels
- [printable(name) for name in names]
+ names

plumbing/dense.py tests/test_dense.py::test_names_of_classes_are_told_apart_and_fit_their_labels
- if not 1 <= len(names) <= IGNORED or
+ if

plumbing/dense.py tests/test_dense.py::test_a_split_without_any_label_is_refused
- if largest < 0:
+ if largest < 0 and not names:

protocols/segmentation.py tests/test_segmentation.py::test_a_head_diverged_only_where_its_scores_are_not_finite
- return note_diverged(dict.fromkeys(RESULTS, math.nan))
+ return dict.fromkeys(RESULTS, math.nan)

protocols/segmentation.py tests/test_segmentation.py::test_a_head_diverged_only_where_its_scores_are_not_finite
- if not found.any():
+ if False:

protocols/segmentation.py tests/test_segmentation.py::test_confusion_has_the_truth_in_rows_over_the_whole_data
- truth * classes + prediction
+ prediction * classes + truth

protocols/segmentation.py tests/test_segmentation.py::test_mean_iou_matches_sets_of_pixels
- counts.sum(dim=0) + counts.sum(dim=1) - right
+ counts.sum(dim=0) + counts.sum(dim=1)

protocols/segmentation.py tests/test_segmentation.py::test_confusion_has_the_truth_in_rows_over_the_whole_data
- class_ious(confusion).nanmean()
+ class_ious(confusion).nan_to_num().mean()

protocols/segmentation.py tests/test_segmentation.py::test_parts_of_a_batch_count_alike_and_ignored_ones_never_give_nan
- ignore_index=IGNORED, reduction="none").mean()
+ ignore_index=IGNORED)

protocols/segmentation.py tests/test_segmentation.py::test_a_vit_gives_the_blocks_that_mmsegmentation_takes
- for part in (4, 6, 8)
+ for part in (3, 6, 9)

protocols/segmentation.py tests/test_segmentation.py::test_maps_of_every_encoder_end_with_its_own_features
- x[:, 1:].movedim(1, 2)
+ x[:, :-1].movedim(1, 2)

protocols/segmentation.py tests/test_segmentation.py::test_maps_of_every_encoder_end_with_its_own_features
- x = encoder.norm(x)
+ x = x

protocols/segmentation.py tests/test_segmentation.py::test_windows_cover_every_place_two_thirds_of_a_window_apart
- range(0, length - size + step, step)
+ range(0, length - size + 1, step)

protocols/segmentation.py tests/test_segmentation.py::test_scores_of_large_pictures_are_those_of_windows_in_their_places
- times[top : top + size, left : left + size] += 1
+ times += 1

protocols/training.py tests/test_segmentation.py::test_heads_take_every_encoder_and_reach_every_weight
- self.encoder.eval()  # its norms keep their statistics
+ pass

protocols/segmentation.py tests/test_segmentation.py::test_the_auxiliary_head_counts_by_its_weight
- self.config.aux_weight * pixel_loss
+ pixel_loss

protocols/segmentation.py tests/test_segmentation.py::test_a_pyramid_joins_every_map_at_the_size_of_the_finest
- [min(2, most), min(1, most), 0, -1]
+ [2, 1, 0, -1]

protocols/segmentation.py tests/test_segmentation.py::test_a_pyramid_joins_every_map_at_the_size_of_the_finest
- F.adaptive_avg_pool2d(last, n)
+ F.adaptive_avg_pool2d(last, last.shape[-2:])

protocols/segmentation.py tests/test_segmentation.py::test_what_diverged_has_no_value
- parameter.isfinite().all() for parameter in encoder.parameters()
+ True for parameter in encoder.parameters()

protocols/dense.py tests/test_segmentation.py::test_dense_protocols_have_data_of_their_own
- if len(protocols) > 1:
+ if len(protocols) > 2:

protocols/settings.py tests/test_segmentation.py::test_each_method_has_the_recipe_of_its_paper_on_ade20k
- BySize(0.65, 0.75)
+ 0.65

protocols/settings.py tests/test_segmentation.py::test_dense_protocols_have_data_of_their_own
- "segment": ("linear", "pyramid")}
+ "segment": ("linear", "tran1", "pyramid")}

protocols/run_folders.py tests/test_segmentation.py::test_the_iou_of_each_class_is_told_below_the_table
- reverse=True) if len(ious) > 12
+ reverse=False) if len(ious) > 12

plumbing/boxes.py tests/test_boxes.py::test_the_mask_is_what_the_picture_fills
- (torch.arange(side, device=share.device) + 0.5) / side
+ torch.arange(side, device=share.device) / side

plumbing/boxes.py tests/test_boxes.py::test_targets_are_split_as_the_pictures_are
- there = (labels >= 0) & (high > low).all(dim=-1)
+ there = labels >= 0

plumbing/boxes.py tests/test_boxes.py::test_boxes_in_memory_move_with_the_picture
- .div(step[:, None]).sort(dim=0).values
+ .div(w[:, None]).sort(dim=0).values

plumbing/boxes.py tests/test_boxes.py::test_scenes_have_the_box_of_what_is_seen
- size - line.flip(-1)
+ size - 1 - line.flip(-1)

plumbing/boxes.py tests/test_boxes.py::test_sizes_are_those_of_detr
- size = max(1, min(size, round(longest * short / long)))
+ size = max(1, size)

plumbing/boxes.py tests/test_boxes.py::test_no_side_is_longer_than_the_longest
- min(longest, max(1, int(size * long / short)))
+ int(size * long / short)

plumbing/boxes.py tests/test_boxes.py::test_windows_are_those_of_detr
- draw.uniform(384, 600) * unit / scale)
+ draw.uniform(384, 600) * unit)

plumbing/boxes.py tests/test_boxes.py::test_boxes_of_files_move_with_the_picture
- kept = left & ~objects.crowd
+ kept = left

plumbing/boxes.py tests/test_boxes.py::test_boxes_of_files_move_with_the_picture
- np.stack([1 - boxes[:, 2], boxes[:, 1], 1 - boxes[:, 0], boxes[:, 3]], axis=1)
+ boxes

plumbing/dense.py tests/test_boxes.py::test_a_turned_picture_is_upright_where_its_annotations_are
- image = upright if upright.size == (width, height) else image
+ image = image

protocols/detect.py tests/test_detect.py::test_other_classes_to_test_on_are_refused
-     check_classes(subject)
+     pass

protocols/detect.py tests/test_detect.py::test_kept_maps_are_those_of_the_pictures
- for x in (images, images.flip(-1)))
+ for x in (images, images))

protocols/detect.py tests/test_detect.py::test_kept_maps_are_those_of_the_pictures
- torch.where(flipped[:, None], *pair) for pair in ((1 - x1, x0), (1 - x0, x1))
+ torch.where(flipped[:, None], *pair) for pair in ((1 - x0, x0), (1 - x1, x1))

protocols/detect.py tests/test_detect.py::test_kept_maps_are_those_of_the_pictures
- if not self.detector.kept:
+ if True:

protocols/detect.py tests/test_detect.py::test_kept_maps_are_those_of_the_pictures
- yield indices + len(self) * flipped, targets_of
+ yield indices, targets_of

protocols/detect.py tests/test_detect.py::test_mirrored_and_upright_pictures_are_drawn_anew_in_each_batch
- flipped = draw < flip
+ flipped = draw < 0

protocols/detect.py tests/test_detect.py::test_maps_of_whole_pictures_alone_are_kept
- if method.frozen and isinstance(train, BoxImages) and config.crop_min >= 1:
+ if method.frozen and isinstance(train, BoxImages):

protocols/detect.py tests/test_detect.py::test_maps_of_whole_pictures_alone_are_kept
- if method.frozen and isinstance(train, BoxImages) and config.crop_min >= 1:
+ if isinstance(train, BoxImages) and config.crop_min >= 1:

protocols/detect.py tests/test_detect.py::test_the_loss_is_that_of_a_loop_over_pictures
- OVERLAP * overlap
+ CLASS * overlap

protocols/detect.py tests/test_detect.py::test_the_loss_is_that_of_a_loop_over_pictures
- torch.where(wanted == classes, NO_OBJECT, 1.0)
+ torch.where(wanted == classes, 1.0, 1.0)

protocols/detect.py tests/test_detect.py::test_the_loss_is_that_of_a_loop_over_pictures
- mine = (layer == number) / truths
+ mine = torch.ones_like(layer) / truths

protocols/detect.py tests/test_detect.py::test_the_loss_does_not_depend_on_how_many_processes_share_a_batch
- *weights, truths = average(counts)
+ *weights, truths = counts

protocols/detect.py tests/test_detect.py::test_the_loss_of_nothing_and_of_what_is_not_finite
- if not costs.isfinite().all():
+ if costs.isinf().any():

protocols/detect.py tests/test_detect.py::test_the_plain_decoder_sees_the_picture_alone
- queries = block(queries, memory, memory_key_padding_mask=hidden)
+ queries = block(queries, memory)

protocols/detect.py tests/test_detect.py::test_mobile_formers_decoder_has_maps_that_are_0_outside
- x * mask_like(mask, x)[:, None] for x
+ x for x

protocols/detect.py tests/test_detect.py::test_padding_has_the_mean_colour
- images = torch.where(mask[:, None], images, self.encoder.mean)
+ images = images

protocols/detect.py tests/test_detect.py::test_the_best_class_of_each_query_is_found
- softmax(dim=-1)[..., :-1].max(dim=-1)
+ softmax(dim=-1).max(dim=-1)

protocols/detect.py tests/test_detect.py::test_a_decoder_that_does_not_fit_is_said
- if config.head not in DEPTHS or isinstance(encoder, MobileFormer):
+ if config.head not in DEPTHS:

protocols/detect.py tests/test_detect.py::test_no_truth_is_not_called_divergence
- if all(bool(torch.as_tensor(test.truth(i)["crowd"]).all()) for i in range(len(test))):
+ if False:

protocols/dense.py tests/test_detect.py::test_a_transformer_keeps_its_size_and_what_was_trained_is_recorded
- config, idle = fitting(encoder, config), {}
+ idle = {}

protocols/dense.py tests/test_detect.py::test_a_transformer_keeps_its_size_and_what_was_trained_is_recorded
- sides = load_encoder(path).image_sides or (SIDES[dense[0]],) * 2
+ sides = (SIDES[dense[0]],) * 2

protocols/dense.py tests/test_detect.py::test_a_mobile_former_has_pictures_of_the_papers_size
- load_encoder(path).image_sides or
+ load_encoder(path).image_sides or (32, 32) or

protocols/detect.py tests/test_detect.py::test_the_protocol_runs_on_a_folder_frozen_and_then_fine_tuned
- if isinstance(module, nn.modules.batchnorm._BatchNorm):
+ if False:

protocols/detect.py tests/test_detect.py::test_the_loss_of_nothing_and_of_what_is_not_finite
- (logits.sum() + boxes.sum()) * math.nan
+ logits.sum() * math.nan

protocols/detect.py tests/test_detect.py::test_the_loss_of_nothing_and_of_what_is_not_finite
- average(logits.new_zeros(layers + 1))
+ pass

protocols/settings.py tests/test_dense_protocols.py::test_settings_that_are_changed_still_tell_what_of_the_recipe_moved
- found.moved = config.moved
+ pass

plumbing/command.py tests/test_command.py::test_what_was_printed_before_is_not_lost_among_several_processes
- sys.stdout.flush()
+ pass

plumbing/runs.py tests/test_runs.py::test_a_signal_after_the_last_step_is_not_swallowed
- if self.signals and error[0] is None:
+ if False:

plumbing/run_files.py tests/test_run_files.py::test_a_flag_that_had_no_value_is_not_given_as_advice
- hasattr(config, str(x)) and words(old[x])]
+ hasattr(config, str(x))]

plumbing/processes.py tests/test_processes.py::test_cpu_is_always_there_and_an_unknown_device_is_refused
- torch.zeros(1, device=chosen).item()
+ torch.empty(0, device=chosen)

plumbing/dense.py tests/test_dense.py::test_palettes_of_few_bits_have_their_indices
- if depth < 8 and image.mode != "P":
+ if depth < 8:

plumbing/dense.py tests/test_dense.py::test_bad_folders_are_one_line_with_the_file
- if len(found) == 1:
+ if False:

plumbing/scenes.py tests/test_dense.py::test_scenes_too_small_to_show_shapes_are_refused
- if size < 16:
+ if False:

plumbing/runs.py tests/test_common.py::test_a_resumed_run_goes_on_with_its_loss_scale
- except torch.OutOfMemoryError:
+ except ZeroDivisionError:

plumbing/run_files.py tests/test_asked.py::test_what_cannot_be_read_is_one_clear_line
- (OSError, ValueError, RecursionError)
+ (OSError, ValueError)

protocols/settings.py tests/test_dense_protocols.py::test_flags_that_have_no_effect_are_told_in_a_line
- ("linear", "tran1", "tran4"), ("head",
+ ("tran1", "tran4"), ("head",

protocols/heads.py tests/test_frozen.py::test_linear_heads_are_trained_by_plain_gradient_descent
- layer_groups(None, layer, 1.0, config.weight_decay, config.decay_on)
+ layer_groups(None, layer, 1.0, config.weight_decay, "all")
"""


class Mutant(NamedTuple):
    file: str
    old: str
    new: str
    tests: list

    def __str__(self):
        old, new = (" ".join(text.split()) for text in (self.old, self.new))
        shown = [text if len(text) <= 46 else text[:43] + "..." for text in (old, new or "nothing")]
        return f"{self.file:<29}{' -> '.join(shown):<98}"

    def put_into(self, code: dict) -> dict:
        """The files {path: text} with this bug. Raises ValueError where its text is not there, or not once."""
        if (count := code[self.file].count(self.old)) != 1:
            raise ValueError(f"{self.old!r} occurs {count} times in {self.file}, not once; mend its mutant")
        return code | {self.file: code[self.file].replace(self.old, self.new)}


def read_mutants() -> list:
    """The entries of MUTANTS: a file and tests, more tests where a line is indented, then the lines that differ."""
    mutants = []
    for block in MUTANTS.strip().split("\n\n"):
        lines = block.splitlines()
        old, new = ("\n".join(line[2:] for line in lines if line[0] == sign) for sign in "-+")
        file, *tests = " ".join(line for line in lines if line[0] not in "-+").split()
        mutants.append(Mutant(file, old, new, tests))
    return mutants


def run_tests(code: dict, tests: list, limit: float) -> str:
    """Run tests on the files {path: text} -> "" where all pass, else the first that fails, or "the time limit".

    Raises ValueError where pytest cannot even start them.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        for path, text in code.items():
            (Path(name) / path).parent.mkdir(exist_ok=True)
            (Path(name) / path).write_text(text)
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
        env = os.environ | {"CI": "true", "OMP_NUM_THREADS": "1", "TMPDIR": name}  # CI: random examples stay the same
        with open(Path(name) / "output", "w+") as output:
            streams = {"stdout": output, "stderr": subprocess.STDOUT}
            child = subprocess.Popen(command, cwd=name, env=env, start_new_session=True, **streams)
            try:
                status = child.wait(limit)
            except subprocess.TimeoutExpired:
                return "the time limit"
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)  # with the processes that a test has started
            output.seek(0)
            found = re.search(r"^(?:FAILED|ERROR:?) (.*?)(?: - .*)?$", output.read(), flags=re.MULTILINE)
    failed = found[1] if found else f"exit code {status}"
    if 2 <= status <= 5:
        raise ValueError(f"pytest cannot start {' '.join(tests)} ({failed})")
    return failed if status else ""


def main(argv: list) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", metavar="file", help="whose mutants to run; all without any")
    parser.add_argument("--jobs", type=int, default=2, help="mutants at a time (default: 2)")
    parser.add_argument("--list", action="store_true", help="print the mutants without running them")
    args, mutants = parser.parse_args(argv), read_mutants()
    files = args.files or list(dict.fromkeys(mutant.file for mutant in mutants))
    mutants = [mutant for mutant in mutants if mutant.file in files]
    if args.list:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `--list | head` ends in silence
        print("\n".join(f"{mutant}{' '.join(mutant.tests)}" for mutant in mutants))
        return 0
    patterns = ("*.py", "*/*.py", "*.md", "docs/*.md", "docs/*.ipynb", "tests/*.json")
    texts = [path for pattern in patterns for path in ROOT.glob(pattern)]
    code = {str(path.relative_to(ROOT)): path.read_text() for path in texts}
    tests = {file: {test for mutant in mutants if mutant.file == file for test in mutant.tests} for file in files}
    survived, pool = [], concurrent.futures.ThreadPoolExecutor(args.jobs)

    def time_without(file):  # a limit for the mutants of a file: twice what all their tests take without any, or LIMIT
        started = time.perf_counter()
        if failed := run_tests(code, sorted(tests[file]), 20 * LIMIT):
            raise ValueError(f"the tests of {file} fail without any mutant, at {failed}")
        return max(LIMIT, 2 * (time.perf_counter() - started))

    try:
        if strange := [file for file in files if not tests[file]]:
            raise ValueError(f"there are no mutants of {strange[0]!r}")
        broken = [mutant.put_into(code) for mutant in mutants]
        limits = dict(zip(files, pool.map(time_without, files), strict=True))
        runs = [pool.submit(run_tests, c, m.tests, limits[m.file]) for m, c in zip(mutants, broken, strict=True)]
        for mutant, run in zip(mutants, runs, strict=True):
            killer = run.result()
            survived += [] if killer else [mutant.file]
            print(f"{mutant}{'killed by ' + killer.split('::')[-1] if killer else 'SURVIVED'}", flush=True)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        pool.shutdown(cancel_futures=True)
    for file in files:
        count = sum(mutant.file == file for mutant in mutants)
        print(f"{file}: {count - survived.count(file)} of {count} killed")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
