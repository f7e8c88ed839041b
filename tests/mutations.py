"""One way or two to break each promise of the package, with the tests that should notice.

    make mutations                                    # all of them
    .venv/bin/python tests/mutations.py rows chat     # those whose name, promise or target holds all of these words

A promise stands in the README or among the invariants of the design. A mutation is called in the place of a function
(breaking.py); it goes by what the function does, not by how its lines are worded.
"""

import contextlib
import json
import signal
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import torch

import breaking
from breaking import mutation
from flexreason.data import tables
from flexreason.proof import evidence
from flexreason.train import filling
from flexreason.tree.layout import Layout
from flexreason.tree.sample import Role

IGNORED = -100

# --- the idea

SEES = "a token sees its ancestors and itself: visible(q, kv) <=> kv <= q < until[kv]"


@mutation(SEES, "flexreason.tree.interval_rule", "test_layout.py::test_a_token_sees_its_ancestors_and_itself")
def a_subtree_ends_one_token_late(original, until):
    return original(until + 1)


@mutation(
    "the paper's rule is the paper's table",
    "flexreason.tree.turn_role_rule",
    "test_mask.py::test_the_turn_role_rule_is_the_papers_table",
)
def reasoning_is_history(original, turn, role, document):
    is_reasoning = (role & Role.REASONING) != 0
    return original(turn, torch.where(is_reasoning, role | Role.CONTEXT, role), document)


@mutation(
    "windows and chunks are measured in positions, not in indices",
    "flexreason.tree.near",
    "test_mask.py::test_windows_and_chunks_are_measured_in_positions",
)
def windows_are_measured_in_storage(original, position, window, chunk):
    return original(torch.arange(len(position), dtype=position.dtype), window, chunk)


BLOCKS = "the block mask in closed form is the dense mask pooled by block"


@mutation(
    BLOCKS,
    "flexreason.tree.block_mask",
    "test_blocks.py::test_the_block_mask_of_any_tree_is_its_dense_mask_pooled",
)
def blocks_are_those_of_a_smaller_tree(original, tree, **options):
    until = tree.until if isinstance(tree, Layout) else tree["until"]
    until = torch.maximum(until - 1, torch.arange(1, until.shape[-1] + 1, dtype=until.dtype))
    return original(replace(tree, until=until) if isinstance(tree, Layout) else {**tree, "until": until}, **options)


@mutation(BLOCKS, "flexreason.tree.block_mask", "test_blocks.py::test_windowed_and_chunked_lists_are_exact")
def blocks_know_no_window(original, tree, window=None, chunk=None, **options):
    return original(tree, **options)


@mutation(
    "storage is preorder, the child that most samples share first",
    "flexreason.tree._Branch.order",
    "test_layout.py::test_lay_out_stores_the_prefix_tree_in_preorder_most_shared_child_first",
)
def the_child_that_fewest_share_comes_first(original, self):
    shared, *others = original(self)
    return (-shared, *others)


@mutation(
    "roles are the union over the samples through a token",
    "flexreason.tree.lay_out",
    "test_layout.py::test_roles_are_the_union_and_turns_the_one_said_else_the_first_samples",
)
def a_token_has_one_role(original, samples):
    layout = original(samples)
    return replace(layout, role=layout.role & -layout.role)


@mutation(
    "a target is predicted by the token before it in its sample, not by the one stored before",
    "flexreason.tree.lay_out_turns",
    "test_single_pass.py::test_a_conversation_in_one_pass_is_its_n_samples",
)
def the_token_stored_before_predicts(original, turns):
    layout = original(turns)
    source = layout.target_source.clone()
    for turn in range(layout.n_samples):
        own = (layout.target_turn == turn).nonzero()[:, 0]
        if len(own) > 1:
            source[own[0]] = source[own[1]] - 1
    return replace(layout, target_source=source)


@mutation(
    "a turn without reasoning has a loss like any other",
    "flexreason.tree.lay_out_turns",
    "test_layout.py::test_unmerge_gives_the_samples_of_a_conversation_back",
)
def a_turn_without_reasoning_has_one_target(original, turns):
    layout = original(turns)
    bare = torch.tensor([not len(t) for _, t, _ in turns])[layout.target_turn]
    first = torch.cat([torch.ones(1, dtype=torch.bool), layout.target_turn.diff() != 0])
    kept = ~bare | first
    names = ("target_source", "target_ids", "target_turn", "target_weight")
    return replace(layout, **{name: getattr(layout, name)[kept] for name in names})


@mutation(
    "unmerge gives the samples back in the order given",
    "flexreason.tree.unmerge",
    "test_layout.py::test_unmerge_gives_any_samples_back_in_the_order_given",
)
def samples_come_back_in_another_order(original, layout):
    return original(layout)[::-1]


ROW = "packing, padding and order of documents change no log-probability"
HOLDS = "test_row.py::test_a_row_holds_its_documents_side_by_side_and_nothing_between_them"


@mutation(ROW, "flexreason.tree.collate", HOLDS)
def documents_see_the_one_before(original, *args, **options):
    row = original(*args, **options)
    row["until"] = torch.where(row["document"] == 0, row["until"].shape[1], row["until"]).to(torch.int32)
    return row


@mutation(ROW, "flexreason.tree.collate", HOLDS)
def targets_are_sought_where_the_document_alone_has_them(original, *args, **options):
    row = original(*args, **options)
    start = [int((row["document"][0] == number).nonzero()[0]) for number in range(int(row["document"].max()) + 1)]
    shift = torch.tensor([*start, 0])[row["target_document"]]
    return {**row, "target_source": row["target_source"] - shift}


@mutation(
    "a row given to a model that is not patched raises",
    "flexreason.tree.collate",
    "test_patching.py::test_a_row_given_to_a_model_that_is_not_patched_raises",
)
def a_row_looks_like_an_ordinary_batch(original, *args, **options):
    row = original(*args, **options)
    row["attention_mask"] = torch.ones_like(row["input_ids"])
    return row


# --- attention

ATTENTION = "attention over the tree, and its gradients, are those of attention written out"
WRITTEN_OUT = "test_attention.py::test_output_and_gradients_are_those_of_attention_written_out"


@mutation(
    ATTENTION,
    "flexreason.attention.cover.cover",
    "test_cover.py::test_every_visible_pair_of_any_row_is_computed_exactly_once",
)
def a_rectangle_is_left_out(original, *args):
    return original(*args)[:-1]


@mutation(ATTENTION, "flexreason.attention.merge", WRITTEN_OUT)
def parts_are_added_and_not_weighed(original, out, lse, more_out, more_lse):
    before = out.clone()
    original(out, lse, more_out, more_lse)
    out.copy_(before + more_out.to(out.dtype))


@mutation(ATTENTION, "flexreason.attention.pieces.backward", WRITTEN_OUT)
def backward_forgets_what_the_output_was(original, how, grad, q, k, v, out, *others):
    return original(how, grad, q, k, v, torch.zeros_like(out), *others)


@mutation(ATTENTION, "flexreason.attention.segments.attend", WRITTEN_OUT)
def sinks_are_dropped(original, q, k, v, work, scale, softcap=None, sinks=None):
    return original(q, k, v, work, scale, softcap)


@mutation(
    ATTENTION, "flexreason.attention.flex.attend", "test_attention.py::test_compiled_flex_forward_is_dense_on_cpu"
)
def the_soft_cap_is_dropped(original, q, k, v, visible, scale, softcap=None, sinks=None):
    return original(q, k, v, visible, scale, None, sinks)


PASS = "test_patching.py::test_one_pass_has_the_loss_log_probabilities_and_gradients_of_the_samples"


@mutation("layers with a window see no further than it", "flexreason.attention.segments.prepare", PASS)
def layers_have_no_window(original, tree, mask="interval", window=None, chunk=None):
    return original(tree, mask)


# --- inside a model

EXACT = "loss, log-probabilities and gradients are those of the N samples"


@mutation(EXACT, "flexreason.model.with_states", PASS)
def the_head_gets_the_state_of_another_token(original, output, states):
    return original(output, states.roll(1, 1))


@mutation(EXACT, "flexreason.model.Head.__call__", "test_head.py::test_chunked_loss_and_logprobs_are_the_samples")
def cap_and_scale_behind_the_head_are_dropped(original, self, hidden):
    return self.root.get_output_embeddings()(hidden)


WEIGHTS = "loss = sum of w x nll / sum of w, or the divisor that was said"


@mutation(
    WEIGHTS,
    "flexreason.model.TreeLoss.__call__",
    "test_patching.py::test_the_loss_is_the_weighted_mean_over_targets",
)
def targets_weigh_alike(original, self, logits, labels, *args, **given):
    if "target_weight" in given:
        given["target_weight"] = (given["target_weight"] > 0).to(given["target_weight"])
    return original(self, logits, labels, *args, **given)


@mutation(WEIGHTS, "flexreason.model.TreeLoss.__call__", "test_weights.py::test_a_divisor_is_a_number_above_0")
def a_divisor_has_no_sign(original, self, logits, labels, *args, **given):
    if isinstance(given.get("num_items_in_batch"), int | float):
        given["num_items_in_batch"] = abs(given["num_items_in_batch"]) or 1
    return original(self, logits, labels, *args, **given)


@mutation(
    "an empty row adds exactly nothing",
    "flexreason.model.TreeLoss.__call__",
    "test_weights.py::test_a_row_without_targets_adds_exactly_nothing",
)
def a_row_without_targets_divides_by_them(original, self, logits, labels, *args, **given):
    loss, real = original(self, logits, labels, *args, **given), given["shift_labels"] != IGNORED
    return loss if loss.dim() else loss / real.any()


@mutation(
    "a loss that cannot weight is refused with weights other than one, and 0 is other than one",
    "flexreason.model.is_weighted",
    "test_weights.py::test_0_is_another_weight_where_the_loss_cannot_weigh",
)
def a_weight_of_0_is_none(original, weight, real=True):
    return original(torch.where(weight == 0, 1.0, weight), real)


@mutation(
    "weights are refused where a trainer divides by the number of targets",
    "flexreason.model.trainers_count",
    "test_weights.py::test_weights_are_refused_where_a_trainer_divides_by_the_number_of_targets",
)
def whatever_divides_counts_weights(original, n_items):
    return False


@mutation(
    "ordinary batches and generation stay the same to the last bit",
    "flexreason.model.TreeLoss.__call__",
    "test_patching.py::test_ordinary_batches_are_the_same_to_the_last_bit_before_during_and_after",
)
def ordinary_batches_are_touched(original, self, logits, labels, *args, **given):
    loss = original(self, logits, labels, *args, **given)
    return loss if "target_weight" in given else loss * 1.0001


@mutation(
    "unpatch restores the model",
    "flexreason.model.unpatch",
    "test_patching.py::test_unpatch_restores_everything_and_patching_twice_is_no_harm",
)
def unpatch_leaves_what_it_found(original, model):
    return model


@mutation(
    "what is done to a model after patch is honoured or refused",
    "flexreason.model.Patch.as_it_is_now",
    "test_after_patch.py::test_a_loss_function_set_later_is_the_one_that_counts",
)
def nobody_looks_at_a_model_again(original, self, decoder):
    return None


@mutation(
    "adapters that cannot be exact are refused, however late they come",
    "flexreason.model.reason_against_adapter",
    "test_after_patch.py::test_adapters_that_cannot_be_exact_are_refused_however_late_they_come",
)
def any_adapter_will_do(original, module):
    return None


REFUSED = "exact, or refused with the reason"


@mutation(
    REFUSED,
    "flexreason.model.reason_against",
    "test_patching.py::test_attention_dropout_is_refused_and_other_dropout_said_once",
)
def any_model_will_do(original, root):
    return None


@mutation(REFUSED, "flexreason.model.refuse_row", "test_patching.py::test_what_is_not_one_whole_row_is_refused")
def anything_is_a_row(original, *args):
    return None


@mutation(
    REFUSED,
    "flexreason.model.refuse_rope",
    "test_patching.py::test_rope_that_reads_the_longest_position_is_refused_only_where_samples_straddle_its_threshold",
)
def samples_may_straddle_a_rope_threshold(original, *args):
    return None


@mutation(
    REFUSED,
    "flexreason.model.refuse_tokens",
    "test_patching.py::test_tokens_that_the_model_has_not_are_told_at_the_door",
)
def any_token_will_do(original, *args):
    return None


@mutation(
    REFUSED,
    "flexreason.model.refuse_other_layouts",
    "test_patching.py::test_other_layouts_are_refused_under_the_papers_rule",
)
def the_papers_rule_takes_any_layout(original, row):
    return None


@mutation(REFUSED, "flexreason.model.refuse_call", "test_weights.py::test_what_shifts_a_rows_targets_is_refused")
def labels_may_be_taken_out(original, given):
    return None


# --- proof

TESTED = "a class that is not on the list is tested, and refused where it is not exact"


@mutation(
    TESTED,
    "flexreason.proof.check",
    "test_families.py::test_an_unknown_class_that_reads_its_neighbours_is_refused_with_the_numbers",
)
def every_class_passes_its_test(original, *args, **options):
    return replace(original(*args, **options), verdict="exact", reason="")


BELIEVED = (
    "test_families.py::test_the_list_is_believed_for_the_source_the_structure_and_the_torch_it_was_made_with_only"
)


@mutation("the list is believed of the source that was tested", "flexreason.proof.source_of", BELIEVED)
def any_source_is_the_one_that_was_tested(original, cls, *args):
    return evidence.listed()["models"].get(cls.__name__, {}).get("source") or original(cls, *args)


@mutation("the list is believed of the structure that was tested", "flexreason.proof.structure_of", BELIEVED)
def any_structure_is_the_one_that_was_tested(original, config, cls=None):
    known = {} if cls is None else evidence.listed()["models"].get(cls.__name__, {})
    return known.get("structure") or original(config, cls)


@mutation(
    "a model with replaced parts is refused until it is verified",
    "flexreason.proof._tiny_parts",
    "test_families.py::test_a_model_with_replaced_parts_is_refused_until_it_is_trusted",
)
def no_part_was_ever_replaced(original, cls, config, edited):
    class Everything(set):
        def __rsub__(self, parts):
            return set()

    return Everything()


@mutation(
    "what is put into a patched model gives a row's tokens what it gives them in their samples",
    "flexreason.model.AddedCode.watch",
    "test_added_code.py::test_what_looks_at_others_or_goes_by_places_is_refused",
)
def added_code_is_not_watched(original, added, row, anew):
    return None


@mutation(
    "a row's tokens have the places that they have on their paths",
    "flexreason.model.refuse_places",
    "test_added_code.py::test_other_places_on_the_way_to_the_decoder_are_refused",
)
def places_are_taken_as_they_come(original, given):
    return None


KEPT = "a kept verdict is believed only where it is whole, and about exactly what is asked"


@mutation(
    KEPT,
    "flexreason.proof.surroundings",
    "test_newer.py::test_what_was_found_beside_something_else_is_not_believed",
)
def verdicts_hold_for_any_surroundings(original):
    return {"flexreason": "any"}


@mutation(
    KEPT,
    "flexreason.proof._is_whole",
    "test_newer.py::test_a_broken_or_poisoned_file_is_not_believed_and_is_mended",
)
def whatever_lies_there_is_a_verdict(original, written):
    return True


VERIFIED = "verify finds what is wrong, or calls it exact"


@mutation(VERIFIED, "flexreason.proof.Error.faults", "test_verification.py::test_not_a_number_is_not_equal")
def what_is_no_number_is_equal(original, self):
    return [name for name in original(self) if getattr(self, name) == getattr(self, name)]


@mutation(
    VERIFIED,
    "flexreason.proof.gradient_errors",
    "test_verification.py::test_a_gradient_that_is_dropped",
)
def a_gradient_that_is_missing_is_passed_over(original, backward, expected):
    found = {}
    backward(found.__setitem__)
    return original(lambda handle: [handle(*each) for each in found.items()], {name: expected[name] for name in found})


@mutation(
    VERIFIED,
    "flexreason.proof.layout_faults",
    "test_verification.py::test_one_wrong_target_index",
    "test_verification.py::test_reasoning_that_leaks_in_the_layout",
)
def layouts_are_believed(original, layout, samples):
    return []


# --- messages

SAMPLES = "prompts are what inference sends, and targets what the model must generate behind them"
REFERENCE = "test_templates.py::test_samples_of_every_trl_template_are_the_reference"


@mutation(SAMPLES, "flexreason.chat.Renderer.plain", REFERENCE)
def prompts_lack_the_generation_prompt(original, self, messages, prompt):
    return original(self, messages, False)


@mutation(
    "a conversation is rendered at one moment",
    "flexreason.chat.frozen_clock",
    "test_templates.py::test_the_date_is_frozen_once_a_conversation",
)
def the_clock_goes_on(original, at=None):
    return contextlib.nullcontext()


@mutation(
    "a template whose next rendering would be another one is refused",
    "flexreason.chat.Renderer._address",
    "test_seam.py::test_an_object_that_is_written_by_its_place_in_memory_is_refused",
)
def places_in_memory_are_texts(original, self, text, messages):
    return None


@mutation(
    "a template whose next rendering would be another one is refused",
    "flexreason.chat._noted",
    "test_seam.py::test_dice_by_another_name_are_refused",
)
def dice_are_known_by_their_names(original, draw, name):
    return draw


HEADER = "the target begins behind the header that prompt and answer both have, which is never guessed"


@mutation(HEADER, "flexreason.chat.find_seam", "test_seam.py::test_another_role_in_the_prompt_is_refused")
def any_header_will_do(original, known, lead, *others):
    seam_at_the_end = original(lead, lead, *others)
    return original(known, lead, *others) or seam_at_the_end


@mutation(HEADER, "flexreason.chat.find_seam", "test_seam.py::test_a_generation_prompt_with_an_attribute")
def the_header_is_generated(original, known, lead, *others):
    seam = original(known, lead, *others)
    return seam if seam is None or lead.startswith(known) else replace(seam, end=0)


STOPS = "the target ends with the token that stops generation, and nothing behind it"


@mutation(
    STOPS,
    "flexreason.chat.Endings.of",
    "test_templates.py::test_targets_end_with_a_token_that_stops_generation",
)
def the_stop_token_is_left_out(original, self, tail, calls):
    end, stop = original(self, tail, calls)
    return end - len(stop.text), stop


@mutation(STOPS, "flexreason.chat.Endings.of", "test_templates.py::test_text_after_the_stop_token")
def what_stands_behind_the_stop_token_is_kept(original, self, tail, calls):
    return len(tail), original(self, tail, calls)[1]


@mutation(
    "all that a message calls is in its target, or it is refused",
    "flexreason.chat.lost_call",
    "test_seam.py::test_a_template_that_loses_something_of_an_argument_is_refused",
    "test_seam.py::test_an_argument_is_not_lost_by_what_other_messages_taught_either",
)
def calls_are_not_looked_at(original, functions, text):
    return None


@mutation(
    "nothing stands behind the token that stops generation, in texts and calls too",
    "flexreason.chat._Survey.turn",
    "test_seam.py::test_what_would_stand_behind_the_stop_token_is_refused",
)
def the_stop_token_may_stand_anywhere(original, self):
    return self._seen()


@mutation(
    HEADER,
    "flexreason.chat.Before.behind_text",
    "test_seam.py::test_a_marker_at_the_end_of_a_users_text_opens_and_closes_nothing",
)
def users_texts_are_the_templates(original, self, prompt):
    return prompt


DIRT = "answers that are none are refused by message and reason, unless they are accepted"


@mutation(
    DIRT,
    "flexreason.chat.refuse",
    "test_dirt.py::test_dirt_is_refused_by_message_and_reason_and_only_where_it_is_trained_on",
)
def dirt_is_trained_on_in_silence(original, *args):
    return None


@mutation(
    DIRT,
    "flexreason.chat.marked",
    "test_dirt.py::test_markers_in_a_field_are_those_of_the_template_and_are_trained_as_they_stand_if_accepted",
)
def only_markers_at_the_ends_of_reasoning_are_seen(original, reasoning, pairs, behind):
    return original(reasoning, pairs, "")


@mutation(DIRT, "flexreason.chat.doubled", "test_dirt.py::test_what_is_no_dirt_needs_no_leave")
def a_block_beside_a_field_is_any_block(original, message, pairs, behind):
    return original(message, pairs, "".join(closing for _, closing in pairs))


@mutation(
    DIRT,
    "flexreason.chat.opened_by",
    "test_dirt.py::test_what_a_model_answers_to_a_prompt_that_opens_the_block_is_reasoning_and_answer",
)
def no_prompt_opens_a_block(original, *args):
    return False


@mutation(
    "messages that say train: false are not trained on",
    "flexreason.chat.is_trained",
    "test_encode.py::test_turns_can_be_chosen_and_messages_excluded",
)
def every_message_is_trained_on(original, number, message):
    return True


@mutation(
    'history="content" takes reasoning out of history',
    "flexreason.chat.Encoder.__init__",
    "test_encode.py::test_history_as_content_has_no_reasoning_even_in_a_tool_loop",
)
def history_is_the_templates_whatever_is_asked_for(original, self, tokenizer, *, history="template", **options):
    return original(self, tokenizer, **options)


@mutation(
    "turns and roles of encoded conversations are true",
    "flexreason.chat.Encoder.encoded",
    "test_encode.py::test_roles_say_what_is_reasoning_response_and_context",
)
def prompts_have_no_roles(original, self, *args):
    encoded = original(self, *args)
    return replace(encoded, samples=[replace(sample, prompt_roles=None) for sample in encoded.samples])


@mutation(
    "targets are tokenized as they stand behind their prompt",
    "flexreason.chat.Running.sample",
    "test_tokens.py::test_a_target_by_itself_gets_no_spurious_space",
    "test_tokens.py::test_line_breaks_that_meet_stay_two_tokens",
)
def a_target_is_tokenized_by_itself(original, self, prompt, target):
    return original(self, prompt, target)[0], self.tokens.whole(target)


# --- data

LOST = "no conversation is lost or cut silently"


@mutation(
    LOST, "flexreason.data.read_conversations", "test_conversations.py::test_every_kind_is_detected_told_and_read"
)
def the_last_conversation_is_not_read(original, *args, **options):
    yield from list(original(*args, **options))[:-1]


@mutation(LOST, "flexreason.data.Refusals.add", "test_intake.py::test_a_refusal_stops_it_when_all_is_known")
def refusals_are_not_counted(original, self, reason, words):
    return None


NULL = "a null that was written is trained, and one that a table put in is not"


@mutation(NULL, "flexreason.data.tables._without_lacking", "test_tables.py::test_null_in_a_json_column_was_written")
def null_of_json_columns_is_taken_out(original, value, feature, as_written, where):
    return tables._without_none(value)


@mutation(
    NULL,
    "flexreason.data.tables._without_put_in",
    "test_tables.py::test_a_plain_row_whose_null_cannot_be_told_is_refused",
)
def a_plain_row_is_taken_as_it_is(original, entry, where):
    return entry


@mutation(LOST, "flexreason.data.folders.split_of", "test_folders.py::test_the_files_of_a_split_are_read")
def no_file_is_of_a_split(original, path):
    return None


@mutation(
    "a system prompt beside messages is the first of them",
    "flexreason.data.formats._with_system",
    "test_entries.py::test_a_system_prompt_beside_messages_is_the_first_message",
)
def a_system_prompt_is_lost(original, messages, about):
    return messages


@mutation(LOST, "flexreason.data.split", "test_splitting.py::test_every_sample_is_in_one_part_as_it_was")
def the_last_part_of_a_tree_is_lost(original, *args, **options):
    found = original(*args, **options)
    return replace(found, parts=found.parts[:-1] or found.parts, turns=found.turns[:-1] or found.turns)


@mutation(
    LOST,
    "flexreason.data.split",
    "test_splitting.py::test_a_sample_longer_than_a_row_is_refused_by_number_or_dropped_as_asked",
)
def what_is_left_out_is_not_told(original, *args, **options):
    return replace(original(*args, **options), dropped=[])


@mutation(LOST, "flexreason.data.Packer.flush", "test_pack.py::test_every_document_once_and_rows_full")
def the_last_row_stays_in_the_pool(original, self):
    yield from list(original(self))[:-1]


@mutation(
    "every conversation once an epoch, each epoch in an order of its own",
    "flexreason.data.Rows.documents",
    "test_train.py::test_rows_hold_every_document_once_an_epoch",
)
def epochs_are_alike(original, self, row):
    return original(self, row % self.starts[1])


@mutation(
    'weighting="turn" makes turns weigh alike',
    "flexreason.data.weighted",
    "test_train.py::test_documents_come_back_from_disk_as_they_were",
)
def every_target_weighs_1(original, layout, weighting):
    return original(layout, "token")


# --- training

STEP = "a step is the mean over all its targets, whatever the accumulation and the number of processes"


@mutation(
    STEP,
    "flexreason.train.total_weight",
    "test_row_trainer.py::test_the_weight_of_a_step_is_summed_over_its_rows",
)
def targets_are_counted_and_not_weighed(original, rows):
    return original([{**row, "target_weight": torch.ones_like(row["target_weight"])} for row in rows])


@mutation(
    STEP,
    "flexreason.train.RowTraining._over_ranks",
    "test_row_trainer.py::test_two_processes_take_the_steps_of_the_loop[ddp-turn-2]",
)
def ranks_do_not_sum(original, self, values):
    return values


@mutation(
    "over several ranks nothing is trained on or evaluated twice",
    "flexreason.train.Filling.__call__",
    "test_row_trainer.py::test_two_processes_train_on_every_document_once_whatever_holds_them",
)
def the_last_batch_is_given_out_again(original, self, batch):
    items = [item for item in batch if not isinstance(item, filling.Nothing)]
    self.last = original(self, batch) if items or not hasattr(self, "last") else self.last
    return self.last


@mutation(
    "evaluation is the mean over targets, by role and by turn",
    "flexreason.train.Sums.losses",
    "test_row_trainer.py::test_evaluation_is_the_mean_over_targets_and_not_over_rows",
)
def evaluation_is_what_the_trainer_says(original, self):
    return {name: value for name, value in original(self).items() if name != "loss"}


@mutation(
    STEP,
    "flexreason.train.FilledStream.__iter__",
    "test_sft_trainer.py::test_twenty_steps_are_those_of_the_loop[stream-True-2]",
)
def a_stream_ends_in_the_middle_of_a_step(original, self):
    return iter(self.data)


@mutation(
    "RowSFTTrainer computes the model's own loss, by weight, with evaluation by targets",
    "flexreason.train.RowSFTTrainer.compute_loss",
    "test_sft_trainer.py::test_weights_of_targets_count",
    "test_sft_trainer.py::test_twenty_steps_are_those_of_the_loop[table-False-4]",
)
def a_row_divides_by_its_own_targets(original, self, model, inputs, return_outputs=False, num_items_in_batch=None):
    return original(self, model, inputs, return_outputs)


@mutation(
    "a table's conversations that are refused are told before training, all of them",
    "flexreason.data._told",
    "test_sft_trainer.py::test_refused_conversations_are_all_named_before_training_or_left_out",
)
def what_is_refused_is_left_out(original, refused, n_read, skip_invalid):
    return original(refused, n_read + 1, True)


@mutation(
    "what contradicts rows is refused by name",
    "flexreason.train._refuse_arguments",
    "test_sft_trainer.py::test_what_contradicts_rows_is_refused_by_name",
)
def contradictions_are_left_to_trl(original, args, others):
    return None


@mutation(
    "a loss that is no number stops the run before anything is saved",
    "flexreason.train._finite",
    "test_row_trainer.py::test_a_loss_that_is_no_number_stops_the_run_and_is_not_saved",
)
def any_loss_is_a_number(original, value):
    return True


@mutation(
    "a checkpoint is whole or is none",
    "flexreason.train.is_whole",
    "test_resume.py::test_a_checkpoint_is_whole_or_is_none",
)
def a_folder_is_a_checkpoint(original, folder):
    return folder.is_dir()


@mutation(
    "a run goes on only as the run that it was",
    "flexreason.train.go_on_from",
    "test_train.py::test_a_run_goes_on_only_as_the_run_it_was",
)
def other_data_and_another_model_go_on(original, output, record, resume):
    path = output / "run.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    same = {name: before[name] for name in ("model", "data") if name in before}
    return original(output, {**record, **same}, resume)


# --- what is shown

SHOWN = "what is shown is what is trained on"


@mutation(SHOWN, "flexreason.show.Scene._parts", "test_show.py::test_a_scene_is_the_samples")
def a_token_more_counts_as_prompt(original, self, path, n_prompt, trained, n_shared):
    return original(self, path, n_prompt + 1, trained, n_shared)


@mutation(
    SHOWN,
    "flexreason.show.Reader.pieces",
    "test_show.py::test_text_is_whole_where_samples_part_within_a_character",
)
def each_token_is_decoded_by_itself(original, self, ids):
    return [original(self, [token])[0] for token in ids]


@mutation(
    "the paper's mask and ours are one mask, permuted",
    "flexreason.tree.in_papers_order",
    "test_show.py::test_the_paper_and_ours_are_one_mask_permuted",
)
def the_papers_order_begins_with_the_last_turn(original, layout):
    return original(layout).flip(0)


@mutation(
    "a refusal is shown at its message, and the rest of the file all the same",
    "flexreason.show.scenes",
    "test_show.py::test_a_refusal_is_shown_at_its_message_and_stops_nothing",
)
def nothing_is_shown_behind_a_refusal(original, found, encoder):
    for scene in original(found, encoder):
        yield scene
        if not hasattr(scene, "layout"):
            return


@mutation(
    "a report goes on past files that cannot be read, and says so",
    "flexreason.data.read_entries",
    "test_report.py::test_a_broken_file_is_told_and_stops_nothing",
)
def a_broken_file_is_passed_in_silence(original, source, split="train", on_broken=None):
    return original(source, split, on_broken and (lambda error: None))


# --- commands that talk

STOPPED = "a run that is stopped says in truth what there is to go on from, and has it"


@mutation(
    STOPPED,
    "flexreason.train.what_is_left",
    "test_interrupt.py::test_a_command_that_is_interrupted_says_so_in_a_line_and_leaves_nothing_broken[train]",
)
def there_is_always_a_checkpoint_to_go_on_from(original, settings):
    return f"the same command goes on from {settings.output}/checkpoints/checkpoint-1"


@mutation(
    STOPPED,
    "flexreason.train.Progress._heed",
    "test_interrupt.py::test_a_run_interrupted_again_and_again_ends_as_one_that_was_not",
)
def a_run_is_stopped_without_a_checkpoint(original, self, step, control):
    original(self, step, control)
    control.should_save = False


@mutation(
    "helpers leave Ctrl-C to the command that they help",
    "flexreason.talk.interrupt.deaf",
    "test_interrupt.py::test_a_process_that_is_started_deaf_does_not_hear_it",
)
def helpers_hear_it_too(original):
    return contextlib.nullcontext()


HELPERS_END = "helpers end with the command that they help, and nobody says a word about it"


@mutation(
    HELPERS_END,
    "flexreason.talk.interrupt.deaf",
    "test_interrupt.py::test_one_that_another_thread_takes_waits_until_the_helper_is_started",
)
@contextlib.contextmanager
def a_mask_is_all_that_keeps_it_away(original):
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@mutation(
    HELPERS_END,
    "flexreason.data.intake._in_processes",
    "test_interrupt.py::test_one_that_comes_to_who_waits_for_helpers_or_reads_what_they_sent_ends_them_without_a_word",
)
def what_nobody_waits_for_is_cancelled(original, pool, workers, read):
    submitted = []

    class Watched:
        def submit(self, *args):
            submitted.append(pool.submit(*args))
            return submitted[-1]

    try:
        yield from original(Watched(), workers, read)
    finally:
        for future in submitted:
            future.cancel()


@mutation(
    HELPERS_END,
    "flexreason.data.intake._Workers.__exit__",
    "test_interrupt.py::test_one_that_comes_to_who_waits_for_helpers_or_reads_what_they_sent_ends_them_without_a_word",
)
def half_a_result_is_waited_for(original, self, kind, *about):
    for process in dict(self._processes).values():
        process.terminate()
    return ProcessPoolExecutor.__exit__(self, kind, *about)


@mutation(
    "what is written is never the data",
    "flexreason.data.check_outputs",
    "test_cli.py::test_a_mistake_is_told_in_one_line_and_nothing_is_lost",
)
def outputs_are_not_looked_at(original, options, names):
    return None


@mutation(
    "programs are told of a sample what people are shown",
    "flexreason.show.plain.plain",
    "test_show.py::test_plain_data_are_the_samples",
)
def all_that_is_alike_is_shared_with_the_prompt_before(original, scene, turns=None):
    made = original(scene, turns)
    for one in made["samples"]:
        one["prompt"], one["target"] = one["prompt"] + one["target"], ""
    return made


@mutation(
    "the time that is left is counted from what was done here",
    "flexreason.talk.telling.Stage.left",
    "test_telling.py::test_what_went_on_before_a_run_was_resumed_does_not_count_for_the_time_left",
)
def what_was_done_before_counts(original, self, now=None):
    skipped, self.skipped = self.skipped, 0
    try:
        return original(self, now)
    finally:
        self.skipped = skipped


@mutation(
    "a misspelt option of a template is refused, and none that is only like another",
    "flexreason.talk.nearest.misspelt",
    "test_encode.py::test_an_option_of_the_template_that_is_misspelt_is_refused_and_one_that_means_nothing_to_it_is_not",
)
def options_that_are_only_alike_are_misspelt(original, name, known):
    return original(name, known) or next((one for one in known if name not in known and name in one), None)


# --- recurrent layers

FORKED = "a recurrent layer goes on from the state that a chain's parent left, in its own document"

ANY_TREE = "test_recurrent.py::test_hybrids_are_exact_on_any_tree"


@mutation(FORKED, "flexreason.recurrent.make_plan", ANY_TREE)
def branches_go_on_from_one_anothers_states(original, *args):
    made = original(*args)
    made.calls = [replace(call, before=call.before[1:] + call.before[:1]) for call in made.calls]
    return made


@mutation(FORKED, "flexreason.recurrent.make_plan", ANY_TREE)
def branches_go_on_from_the_end_of_their_parent(original, in_storage, *args):
    ends = [in_storage[chain.parent].stop if chain.parent >= 0 else chain.fork for chain in in_storage]
    return original([replace(chain, fork=end) for chain, end in zip(in_storage, ends, strict=True)], *args)


@mutation(FORKED, "flexreason.recurrent.make_plan", ANY_TREE)
def documents_go_on_from_the_one_before(original, in_storage, *args):
    changed, last = [], None
    for number, chain in enumerate(in_storage):
        if chain.parent < 0:
            chain = chain if last is None else replace(chain, parent=last, fork=in_storage[last].stop)
            last = number
        changed.append(chain)
    return original(changed, *args)


@mutation(FORKED, "flexreason.recurrent.Call.neutral", ANY_TREE)
def padding_enters_states(original, call, x):
    return x


@mutation(FORKED, "flexreason.recurrent.Call.neutral", ANY_TREE)
def padding_is_limited_from_below_and_not_neutral(original, call, x):
    return original(call, x).clamp(min=1e-3)


@mutation("a convolution sees ancestors", "flexreason.recurrent.near_ancestors", ANY_TREE)
def convolutions_see_neighbours_in_storage(original, stock, tree, x, reach, dim):
    return list(stock(x))


@mutation(
    "every function by which a recurrent layer could compute finds the tree",
    "flexreason.recurrent._over",
    "test_recurrent.py::test_the_fused_kernel_is_left_out_for_rows_alone",
)
def the_fused_kernel_is_left_alone(original, tree, name, entry, stock, *args, **kwargs):
    if name == "mamba2_split_conv1d_scan_combined":
        return stock(*args, **kwargs)
    return original(tree, name, entry, stock, *args, **kwargs)


@mutation(FORKED, "flexreason.recurrent.decayed", ANY_TREE)
def scans_in_torch_begin_from_nothing(original, q, k, v, decay, state, *args):
    return original(q, k, v, decay, None, *args)


@mutation(
    "where a kernel is installed, it computes Mamba-2",
    "flexreason.recurrent.is_torch",
    "test_recurrent.py::test_where_kernels_are_installed_no_torch_of_ours_computes_mamba2",
)
def kernels_are_gone_past(original, stock, package):
    return True


@mutation(
    "backward keeps hardly more of a row than of a plain one",
    "flexreason.recurrent.is_torch",
    "test_recurrent.py::test_backward_keeps_hardly_more_of_a_row_than_of_a_plain_one",
)
def transformers_scan_keeps_its_states(original, stock, package):
    return False


@mutation(
    "what was put in the place of a recurrent layer is noticed at the first row",
    "flexreason.model.Patch.refuse_passed_by",
    "test_recurrent.py::test_a_layer_that_somebody_replaced_is_refused_at_the_first_row",
)
def nobody_counts_recurrent_layers(original, patch, decoder, tree):
    return None


def main(words: list[str]) -> int:
    """Try the mutations that hold all words; 0 where tests noticed every one."""
    mutations = breaking.mutations_of(sys.modules[__name__])
    chosen = {
        name: mutant
        for name, mutant in mutations.items()
        if all(word in f"{name} {mutant.promise} {mutant.target}" for word in words)
    }
    if not chosen:
        print(f"no mutation holds {' and '.join(words)}")
        return 2
    tests = sorted({test for mutant in chosen.values() for test in mutant.tests})
    sound = breaking.run_tests(breaking.HERE, tests, {})
    if sound.returncode:  # a test that fails anyway would notice everything
        print(f"without any mutation these tests do not pass:\n{sound.stdout[-3000:]}{sound.stderr[-1000:]}")
        return 1
    unnoticed = 0
    for name, mutant in chosen.items():
        outcome = breaking.try_out(mutant, f"mutations:{name}")
        unnoticed += not outcome.noticed
        print(f"{name.replace('_', ' '):<62} {outcome.words}", flush=True)
    print(f"\n{len(chosen) - unnoticed} of {len(chosen)} mutations noticed")
    return 1 if unnoticed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
