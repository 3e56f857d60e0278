"""The catalogue of faults: each of the 112 cases, and the tests that claim what the mirror does about it.

One case is a line with its id and its fault, then, indented, one test a line as `FILE::NAME` below tests/. Where a test
is broader than the fault, a last line `why: ...` says why it covers it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

SECTIONS = {"A": 20, "B": 30, "C": 20, "D": 30, "E": 12}  # cases in each

API_TRANSPORT = """
A01 connection refused
    test_api.py::test_unreachable_office_is_transient_and_nothing_was_asked
    test_story_sites.py::test_outage_in_the_midst_of_a_backfill_is_named_probed_slowly_and_survived
    test_report.py::test_a_block_is_unhealthy_once_it_lasts
    why: one office answers for all patients; refused, reset and cut connections end as the same error in the story
A02 the name of the host does not resolve, or its address is wrong
    test_catalogue_api.py::test_host_that_has_no_address_is_named_and_nothing_was_asked
A03 connecting hangs: nobody answers, nobody refuses
    test_catalogue_api.py::test_connection_that_nobody_takes_is_given_up_within_ten_seconds
A04 the office goes silent in the middle of an answer
    test_catalogue_api.py::test_office_that_goes_silent_within_its_answer_is_given_up_at_the_deadline
    test_api.py::test_silent_office_is_ended_by_the_deadline
    test_story_sites.py::test_outage_in_the_midst_of_a_backfill_is_named_probed_slowly_and_survived
A05 connection reset in the middle of an answer
    test_catalogue_api.py::test_reset_connection_is_never_taken_for_an_answer
    test_catalogue_api.py::test_each_request_has_a_connection_of_its_own_though_the_office_would_keep_the_last
    test_story_sites.py::test_untrustworthy_listings_change_nothing_and_have_a_name
A06 connection ended before the announced length
    test_api.py::test_cut_answer_is_never_taken_for_whole
    test_story_sites.py::test_untrustworthy_listings_change_nothing_and_have_a_name
A07 connection ended where no length was announced, or before the last chunk
    test_api.py::test_cut_answer_without_a_length_is_never_taken_for_whole
    test_catalogue_api.py::test_answer_without_its_last_chunk_is_never_taken_for_whole
    test_catalogue_meaning.py::test_page_that_is_cut_or_followed_by_anything_is_refused
A08 answer that drips byte by byte
    test_api.py::test_answer_that_drips_is_ended_by_the_deadline
    test_catalogue_api.py::test_office_that_drips_its_handshake_is_given_up_as_if_nobody_took_the_connection
A09 429, with Retry-After in seconds, as a date, absurd or missing
    test_story_sites.py::test_429_is_obeyed_and_capped_at_an_hour
    test_story_sites.py::test_429_without_retry_after_is_met_with_growing_pauses
    test_pacing.py::test_retry_after_is_seconds_or_a_date
    test_pacing.py::test_any_retry_after_is_none_or_at_most_an_hour
A10 a storm of restarts
    test_catalogue_api.py::test_hundred_restarts_in_ten_seconds_send_no_request_too_many
    test_service.py::test_start_is_on_file_before_the_request
    test_service.py::test_two_processes_and_their_threads_never_start_closer_than_the_spacing
A11 500, 502, 503
    test_catalogue_api.py::test_server_trouble_is_met_with_growing_distance
    test_story_sites.py::test_outage_in_the_midst_of_a_backfill_is_named_probed_slowly_and_survived
A12 504 before anything was done
    test_story_faults.py::test_one_fault_costs_one_more_placement_and_leaves_nothing_behind
    test_story_faults.py::test_three_unanswered_placements_lose_nothing
    test_catalogue_drop.py::test_every_placement_asks_for_a_name_of_128_bits_that_was_never_asked_for
A13 504 after the file was placed
    test_story_faults.py::test_one_fault_costs_one_more_placement_and_leaves_nothing_behind
    test_story_faults.py::test_unanswered_name_is_emptied_again_after_ten_minutes_an_hour_and_a_day
    test_story_faults.py::test_document_of_unknown_name_survives_one_fault_too
A14 401 or 403: the key was revoked
    test_catalogue_api.py::test_revoked_key_is_tried_four_times_an_hour_and_makes_nothing_go_missing
    test_cli.py::test_refused_key_ends_with_12_and_the_right_one_goes_on
A15 404 for a patient who was known
    test_story_listing.py::test_list_that_answers_patient_not_found_concludes_nothing
    test_catalogue_api.py::test_not_found_for_every_patient_is_a_state_and_not_the_end_of_anything
A16 redirect to another host
    test_api.py::test_redirect_is_not_followed_and_the_key_goes_nowhere_else
    test_story_sites.py::test_outage_in_the_midst_of_a_backfill_is_named_probed_slowly_and_survived
A17 TLS: expired, for another host, self-signed, downgraded
    test_catalogue_api.py::test_office_is_believed_with_a_valid_certificate_and_a_modern_protocol_only
    test_api.py::test_certificate_must_be_trusted_and_for_this_host
A18 a proxy named in the environment
    test_api.py::test_request_carries_keys_type_and_close_and_nothing_of_the_environment
A19 an answer that unpacks to gigabytes
    test_catalogue_api.py::test_bomb_of_a_gigabyte_is_refused_in_little_memory
    test_api.py::test_body_over_the_cap_is_refused_after_decoding
A20 an answer over the cap
    test_story_listing.py::test_answer_over_the_cap_is_asked_again_with_smaller_limits
    test_story_listing.py::test_row_over_the_cap_by_itself_fails_the_list_and_not_the_mirror
"""

API_MEANING = """
B01 an HTML page with status 200
    test_api.py::test_what_is_no_list_of_rows_is_refused
    test_story_listing.py::test_page_that_cannot_be_trusted_records_nothing
    test_story_listing.py::test_page_is_asked_for_three_times_and_then_left_for_a_quarter_of_an_hour
    test_story_faults.py::test_one_fault_costs_one_more_placement_and_leaves_nothing_behind
B02 valid JSON of a wrong shape
    test_catalogue_meaning.py::test_any_other_json_is_no_page
    test_catalogue_meaning.py::test_page_of_documents_is_believed_exactly_where_each_row_is_proven
    test_catalogue_meaning.py::test_page_of_sheets_is_believed_exactly_where_each_row_is_proven
    test_story_listing.py::test_page_that_cannot_be_trusted_records_nothing
B03 a truncated listing
    test_story_listing.py::test_list_that_was_cut_short_once_makes_nothing_vanish
    test_story_listing.py::test_list_that_is_cut_short_every_other_time_makes_nothing_vanish
    test_story_week.py::test_document_that_is_still_there_by_number_does_not_vanish
    test_catalogue_meaning.py::TestLyingOffice
B04 an empty list where there were many rows
    test_story_guards.py::test_list_that_is_suddenly_empty_is_held_and_nothing_vanishes
    test_story_guards.py::test_hold_ends_by_itself_after_seven_listings_on_seven_days
    test_story_guards.py::test_fewer_than_twenty_or_less_than_half_are_not_held
B05 many patients shrink in one sweep
    test_story_guards.py::test_fifty_disappearances_in_a_day_are_held_whosoever_they_are
    test_story_guards.py::test_forty_nine_disappearances_in_a_day_are_believed
B06 exactly as many rows as a page holds
    test_story_listing.py::test_list_of_any_length_is_read_whole
    test_story_listing.py::test_roster_of_any_length_is_read_whole
    test_diff.py::test_a_page_ends_the_listing_only_below_its_limit_and_never_at_a_hundred
B07 rows inserted or deleted between two pages
    test_story_listing.py::test_rows_that_shift_between_two_pages_start_the_list_over
    test_story_listing.py::test_row_edited_between_two_pages_starts_the_list_over
B08 duplicated rows, equal or different
    test_catalogue_meaning.py::test_id_that_comes_twice_refuses_the_listing_whether_its_rows_agree_or_not
    test_story_listing.py::test_page_that_cannot_be_trusted_records_nothing
    test_story_sites.py::test_untrustworthy_listings_change_nothing_and_have_a_name
B09 a row of another patient than the one asked for
    test_story_listing.py::test_page_that_cannot_be_trusted_records_nothing
    test_story_sites.py::test_untrustworthy_listings_change_nothing_and_have_a_name
    test_catalogue_meaning.py::test_page_of_documents_is_believed_exactly_where_each_row_is_proven
    test_catalogue_meaning.py::TestLyingOffice
B10 rows without PatNum
    test_api.py::test_row_without_a_required_field_refuses_the_page
    test_catalogue_meaning.py::test_key_that_an_upgrade_renamed_is_a_state_within_the_hour_and_makes_nothing_vanish
B11 numbers as text, float, boolean or with spaces and zeros
    test_catalogue_meaning.py::test_page_of_documents_is_believed_exactly_where_each_row_is_proven
    test_catalogue_meaning.py::test_page_of_sheets_is_believed_exactly_where_each_row_is_proven
    test_api.py::test_row_that_is_not_proven_refuses_the_page
B12 numbers that are negative, zero or too large
    test_catalogue_meaning.py::test_page_of_documents_is_believed_exactly_where_each_row_is_proven
    test_api.py::test_row_that_is_not_proven_refuses_the_page
    test_catalogue_meaning.py::test_largest_keys_are_archived_and_found_again_in_the_archive
B13 neither DocNum nor MountNum
    test_catalogue_meaning.py::test_page_of_documents_is_believed_exactly_where_each_row_is_proven
    test_api.py::test_row_that_is_not_proven_refuses_the_page
B14 DocNum and MountNum both set, or equal numbers that mean different things
    test_catalogue_meaning.py::test_page_of_documents_is_believed_exactly_where_each_row_is_proven
    test_diff.py::test_same_number_as_document_and_as_mount_is_two_items
B15 no DateTStamp
    test_story_mounts.py::test_unchanged_mount_is_fetched_again_at_1_3_7_and_30_days_then_every_90
    test_story_mounts.py::test_changed_image_in_a_mount_is_found_by_the_mounts_age
    test_story_mounts.py::test_old_sheet_without_a_stamp_is_archived_once_and_anew_when_its_fields_change
B16 a DateTStamp that is garbage, ancient or of the future
    test_story_week.py::test_future_and_unreadable_stamps_are_placed_at_once
    test_diff.py::test_stamps_are_never_ordered
    test_diff.py::test_no_stamp_whatever_it_says_holds_a_file_back_longer_than_three_seconds
B17 a DateTStamp in the hour that comes twice or never, or going backwards
    test_catalogue_meaning.py::test_stamp_that_goes_back_when_summer_time_ends_is_a_change
    test_story_mounts.py::test_stamp_of_a_sheet_that_goes_back_is_a_change
    test_diff.py::test_stamps_are_never_ordered
    test_diff.py::test_age_of_a_stamp_is_told_in_office_time_also_in_the_hour_that_comes_twice
B18 the same stamp over other bytes
    test_story_week.py::test_bytes_changed_without_a_stamp_are_found_after_180_days
    test_story_week.py::test_second_edit_within_the_stamps_second_is_found_by_a_second_look
B19 a stamp that changes at each poll over the same bytes
    test_catalogue_meaning.py::test_stamp_that_moves_at_each_poll_makes_no_version_and_at_most_49_placements_a_day
    test_story_week.py::test_edit_without_new_bytes_becomes_a_second_sidecar
B20 a Note that carries megabytes
    test_catalogue_meaning.py::test_megabytes_in_a_note_are_read_in_bounded_memory
    test_catalogue_meaning.py::test_megabytes_in_a_note_go_into_the_archive_and_not_into_the_index
    test_story_week.py::test_uploaded_row_is_archived_from_its_note_without_a_placement
    why: what the door allocates is counted and bounded, whatever the limit of the process
B21 fields that are unknown, missing or null
    test_catalogue_meaning.py::test_page_of_documents_is_believed_exactly_where_each_row_is_proven
    test_catalogue_meaning.py::test_page_of_sheets_is_believed_exactly_where_each_row_is_proven
    test_catalogue_meaning.py::test_fields_that_nobody_knows_change_nothing
    test_api.py::test_row_without_a_required_field_refuses_the_page
B22 a document that moved to another patient with its number
    test_story_week.py::test_document_moved_with_its_number_is_marked_at_once
    test_story_week.py::test_moved_document_is_placed_anew_and_never_copied
B23 a number given again after the practice's database was restored
    test_story_guards.py::test_number_reused_after_a_restore_becomes_a_version_of_its_own
    test_story_guards.py::test_number_reused_for_another_patient_is_reported_and_never_mixed_up
    test_story_guards.py::test_nothing_vanishes_from_a_database_that_went_back
B24 a patient merged or deleted
    test_story_week.py::test_merge_files_everything_under_the_other_patient
    test_story_guards.py::test_merge_of_a_full_patient_holds_nothing_for_long
    test_story_listing.py::test_patient_who_leaves_the_roster_keeps_everything_and_is_not_polled
B25 a Location that names another path than the one asked for
    test_api.py::test_location_of_another_name_is_not_ours
    test_story_faults.py::test_one_fault_costs_one_more_placement_and_leaves_nothing_behind
B26 201, and no file appears
    test_story_faults.py::test_one_fault_costs_one_more_placement_and_leaves_nothing_behind
    test_story_faults.py::test_document_of_unknown_name_survives_one_fault_too
B27 the bytes of another document under the right name
    test_catalogue_meaning.py::test_bytes_of_another_document_are_a_version_that_a_later_look_replaces
    test_story_faults.py::test_another_known_type_than_the_name_says_is_archived_and_flagged
B28 answers of two requests swapped
    test_catalogue_meaning.py::test_lists_of_two_patients_that_are_swapped_are_refused
    test_catalogue_meaning.py::test_answers_about_two_mounts_that_are_swapped_misfile_nothing
    test_api.py::test_another_document_than_asked_is_refused
    test_api.py::test_location_of_another_name_is_not_ours
B29 a key renamed by an upgrade of the office
    test_catalogue_meaning.py::test_key_that_an_upgrade_renamed_is_a_state_within_the_hour_and_makes_nothing_vanish
    test_story_listing.py::test_five_lists_of_bad_answers_are_a_state_of_the_site
B30 the office's clock is wrong
    test_catalogue_meaning.py::test_clock_of_the_office_decides_nothing
    test_diff.py::test_no_stamp_whatever_it_says_holds_a_file_back_longer_than_three_seconds
"""

DROP_SITE = """
C01 a file that is not complete yet
    test_drop.py::test_file_that_plays_a_trick_is_refused_and_the_next_one_pulled
    test_drop_line.py::test_file_that_changes_while_openssh_serves_it_is_not_taken
    test_story_faults.py::test_file_that_grows_while_it_is_read_is_read_again
C02 a file of zero bytes
    test_drop.py::test_file_that_plays_a_trick_is_refused_and_the_next_one_pulled
    test_catalogue_drop.py::test_file_that_stays_empty_is_failing_and_never_archived
C03 a file that grows, shrinks or is rewritten while it is read
    test_drop_line.py::test_file_that_changes_while_openssh_serves_it_is_not_taken
    test_story_faults.py::test_file_that_changes_at_every_read_is_failing_and_recovers
C04 reading ends before the size that was told
    test_drop.py::test_file_that_plays_a_trick_is_refused_and_the_next_one_pulled
    test_drop_line.py::test_file_that_changes_while_openssh_serves_it_is_not_taken
C05 another patient's file at that name
    test_catalogue_drop.py::test_every_placement_asks_for_a_name_of_128_bits_that_was_never_asked_for
    why: nobody else can know or guess the name; a file that lies about itself under it is B27
C06 the connection is cut at the first byte, within, or at the last one
    test_drop_line.py::test_connection_cut_at_any_byte_leaves_no_part_and_the_next_pull_is_whole
    test_drop_line.py::test_backfill_over_a_line_that_keeps_breaking_archives_everything_once
    test_drop.py::test_connection_lost_in_a_file_is_transient_and_leaves_no_part
C07 the site goes silent
    test_drop_line.py::test_half_open_or_dripping_connection_is_given_up_in_time
    test_drop.py::test_site_that_goes_silent_while_connecting_is_given_up
    test_drop.py::test_site_that_goes_silent_while_reading_is_given_up
C08 another host key
    test_drop.py::test_other_host_key_stops_the_site_before_any_login
    test_catalogue_drop.py::test_changed_host_key_is_never_taken_over
    test_story_sites.py::test_drop_that_cannot_be_used_is_named_and_tried_slowly
C09 login refused
    test_catalogue_drop.py::test_refused_login_is_tried_at_most_four_times_an_hour
    test_drop.py::test_wrong_password_is_refused_after_one_try
C10 no permission to read or to remove
    test_catalogue_drop.py::test_what_the_site_does_not_permit_is_told_by_openssh
    test_catalogue_drop.py::test_leftover_that_cannot_be_removed_is_counted_warned_of_and_removed_when_that_is_allowed
    test_catalogue_drop.py::test_file_that_may_not_be_read_is_failing_under_its_own_name
C11 the site's disk is full
    test_catalogue_drop.py::test_full_site_is_a_failure_of_placing_and_its_fragments_are_removed
C12 a folder of a million names
    test_catalogue_drop.py::test_twenty_thousand_foreign_and_hostile_names_are_left_alone_and_ours_are_swept
    test_catalogue_drop.py::test_ordinary_work_never_lists_the_drop_folder
C13 names that are not UTF-8, or hold line ends and escapes
    test_catalogue_drop.py::test_twenty_thousand_foreign_and_hostile_names_are_left_alone_and_ours_are_swept
    test_drop.py::test_names_are_bytes_whatever_they_hold
C14 a link, a folder or a pipe at our name
    test_drop.py::test_each_refusal_stands_in_its_place_and_leaves_no_file
    test_drop.py::test_what_is_not_wanted_is_never_opened
    test_catalogue_drop.py::test_folder_of_ours_that_became_a_link_is_not_emptied
C15 a file over the cap, or larger than the free space
    test_drop.py::test_file_that_plays_a_trick_is_refused_and_the_next_one_pulled
    test_catalogue_drop.py::test_endless_file_is_read_one_byte_past_the_size_it_told
    test_drop.py::test_full_disk_is_named_and_leaves_nothing
    why: the reserve is checked before each batch; what fills the disk all the same is taken back and named archive_full
C16 more bytes than were asked for
    test_drop.py::test_file_that_plays_a_trick_is_refused_and_the_next_one_pulled
    test_catalogue_drop.py::test_packet_over_all_bounds_ends_the_connection_and_is_not_kept
C17 a storm of logins
    test_catalogue_drop.py::test_site_that_breaks_every_reading_is_not_stormed_with_logins
    test_story_sites.py::test_drop_that_cannot_be_used_is_named_and_tried_slowly
    test_story_sites.py::test_file_whose_reading_breaks_the_connection_holds_up_no_other
C18 a site that others can read too
    test_catalogue_drop.py::test_drop_that_other_users_of_the_site_may_enter_is_warned_of
    test_catalogue_drop.py::test_leftover_that_cannot_be_removed_is_counted_warned_of_and_removed_when_that_is_allowed
C19 a file that was removed is back
    test_catalogue_drop.py::test_removed_file_that_is_back_is_removed_again_and_never_archived_twice
    test_story_faults.py::test_unanswered_name_is_emptied_again_after_ten_minutes_an_hour_and_a_day
C20 a site that knows only old algorithms
    test_catalogue_drop.py::test_openssh_with_weak_algorithms_only_is_refused_before_any_login
    test_drop.py::test_site_with_old_algorithms_only_is_explained
"""

LOCAL_MACHINE = """
D01 disk full at any write
    faults/test_io_errors.py::test_failing_disk_is_a_named_state_and_loses_nothing
    test_archive.py::test_full_disk_under_a_real_limit_loses_nothing
    test_index.py::test_full_disk_of_the_state_folder_is_named_and_the_index_lives_on
    test_logs.py::test_line_that_does_not_fit_on_the_disk_leaves_no_half_of_it
    why: ENOSPC at every call of a whole cycle, once and for ever, the index's and the audit log's included
D02 free space below the reserve
    test_archive.py::test_too_little_space_is_told_before_it_is_gone
    test_story_sites.py::test_archive_that_cannot_take_more_is_named_and_goes_on_later
    test_story_frozen.py::test_full_archive_is_told_though_nothing_is_new
D03 no inodes left
    test_catalogue_local.py::test_disk_without_inodes_is_a_full_archive_and_goes_on_later
    faults/test_io_errors.py::test_failing_disk_is_a_named_state_and_loses_nothing
    why: a call that finds no inode fails with ENOSPC
D04 quota, or a limit on the size of files
    test_catalogue_local.py::test_backfill_that_lacks_what_it_needs_leaves_no_half_state_and_the_next_one_finishes
    test_archive.py::test_full_disk_under_a_real_limit_loses_nothing
D05 EIO at any call, once and for ever
    faults/test_io_errors.py::test_failing_disk_is_a_named_state_and_loses_nothing
    test_archive.py::test_failure_at_any_call_leaves_nothing_half_done
D06 fsync fails, then succeeds
    test_archive.py::test_source_whose_fsync_failed_is_thrown_away
    faults/test_io_errors.py::test_failing_disk_is_a_named_state_and_loses_nothing
D07 remounted read-only
    test_archive.py::test_read_only_archive_is_told
    test_story_sites.py::test_archive_that_cannot_take_more_is_named_and_goes_on_later
    faults/test_io_errors.py::test_failing_disk_is_a_named_state_and_loses_nothing
    why: EROFS at every call, once and for ever
D08 archive not mounted
    test_story_sites.py::test_unmounted_archive_is_named_and_nothing_is_written_into_its_mount_point
    test_story_sites.py::test_another_archive_in_its_place_is_left_alone
    test_story_sites.py::test_daemon_without_an_archive_starts_waits_and_catches_up
    test_archive.py::test_nothing_is_written_where_the_right_marker_is_not
D09 no descriptors left
    test_unhappy_ends.py::test_few_descriptors_leave_no_half_state_and_are_no_internal_error
    test_unhappy_ends.py::test_machine_without_descriptors_is_a_named_state
D10 out of memory
    test_catalogue_local.py::test_backfill_that_lacks_what_it_needs_leaves_no_half_state_and_the_next_one_finishes
    test_unhappy_ends.py::test_answer_too_large_for_memory_is_asked_for_in_smaller_pieces_and_kills_nothing
    faults/test_kill_points.py::test_crash_at_any_call_loses_nothing
    why: the kernel's killer is a kill -9
D11 killed at any persistence call
    faults/test_kill_points.py::test_crash_at_any_call_loses_nothing
    faults/test_kill_points.py::test_crash_in_the_recovery_from_a_crash_loses_nothing
    test_end_to_end.py::test_killed_backfill_resumes_each_time_and_archives_nothing_twice
D12 a torn write
    faults/test_kill_points.py::test_crash_at_any_call_loses_nothing
D13 power cut at any persistence call
    faults/test_power_cuts.py::test_power_cut_at_any_persistence_call_loses_nothing
    faults/test_forgetful.py::test_power_cut_on_a_forgetful_file_system_loses_nothing
D14 SIGTERM at any step
    test_cli.py::test_signal_ends_a_backfill_that_then_goes_on
    test_end_to_end.py::test_interrupted_backfill_leaves_a_consistent_state
    faults/test_kill_points.py::test_crash_at_any_call_loses_nothing
    why: whatever step SIGTERM comes in, less is left undone than by a kill in it
D15 a disk that lies about fsync
    test_catalogue_local.py::test_archived_files_that_hands_or_disks_changed_are_kept_aside_and_fetched_again
    test_repair.py::test_the_scrub_hashes_everything_and_says_so
    why: it cannot be prevented; what it did is cut or zeroed files, which the scrub finds and repairs
D16 rot in an archived file
    test_catalogue_local.py::test_archived_files_that_hands_or_disks_changed_are_kept_aside_and_fetched_again
    faults/test_bit_flips.py::test_every_flipped_bit_is_found
    test_repair.py::test_the_scrub_hashes_everything_and_says_so
D17 rot in the index
    faults/test_bit_flips.py::test_every_flipped_bit_is_found
    test_index.py::test_a_flipped_column_of_a_version_is_noticed_before_it_is_told
    test_checker.py::test_no_column_of_a_version_can_change_unnoticed
D18 index lost
    test_story_crashes.py::test_index_rebuilt_from_the_archive_alone_knows_the_same_and_asks_for_nothing
    test_scrub.py::test_mirror_goes_on_after_a_reindex_without_fetching_anything_again
D19 index older than the archive
    faults/test_index_ages.py::test_index_of_any_age_becomes_what_it_was_and_nothing_is_fetched_again
    test_story_crashes.py::test_index_from_a_backup_of_any_age_adopts_what_it_does_not_know
D20 archive older than the index
    test_catalogue_local.py::test_archive_from_a_backup_is_told_within_minutes_and_its_gaps_are_fetched_again
    test_catalogue_local.py::test_version_that_neither_backup_nor_practice_has_is_told_as_lost_until_somebody_acts
D21 index corrupt, or parts of it of another one
    test_catalogue_local.py::test_broken_index_is_refused_or_made_whole_and_nothing_is_fetched_again
    test_catalogue_local.py::test_wal_of_another_practices_index_is_never_worked_with
    test_index.py::test_corrupted_pages_are_a_disk_error_for_reads_and_writes
D22 archived file edited, deleted, renamed or with other modes by hand
    test_catalogue_local.py::test_archived_files_that_hands_or_disks_changed_are_kept_aside_and_fetched_again
    test_catalogue_local.py::test_file_whose_mode_was_changed_by_hand_is_told
    test_archive.py::test_nothing_is_ever_overwritten
D23 foreign file in the archive
    test_scrub.py::test_foreign_files_are_told_and_left_where_they_are
    test_checker.py::test_foreign_things_are_told_wherever_they_lie
    test_repair.py::test_what_is_not_syncds_is_left_alone
D24 two daemons
    test_unhappy_ends.py::test_second_daemon_ends_with_11_and_a_killed_one_leaves_no_lock
    test_service.py::test_second_process_is_refused_and_told_who_holds_the_lock
D25 two machines on one archive
    test_unhappy_ends.py::test_archive_that_another_machine_took_over_is_not_written_any_more
    test_unhappy_ends.py::test_copied_state_on_another_machine_is_refused_by_the_archive
    test_unhappy_ends.py::test_index_is_refused_on_a_network_file_system
D26 clock back, forward, summer time
    test_unhappy_ends.py::test_clock_set_back_ends_every_wait_and_new_documents_still_arrive
    test_unhappy_ends.py::test_clock_set_forward_fetches_nothing_again_and_loses_nothing
    test_unhappy_ends.py::test_clock_set_back_while_syncd_was_down_is_put_right_at_the_start
D27 upgrade or downgrade of the schema, killed within
    test_catalogue_local.py::test_upgrade_killed_at_any_statement_leaves_the_old_index_whole
    test_catalogue_local.py::test_first_start_killed_while_it_makes_its_tables_leaves_none
    test_catalogue_local.py::test_index_of_a_later_syncd_is_refused_and_both_schemas_are_named
    test_catalogue_local.py::test_every_verb_refuses_the_index_of_a_later_syncd_with_78
D28 the log's disk full, journal gone, stdout closed
    test_catalogue_local.py::test_backfill_that_nobody_can_hear_mirrors_everything_and_ends_with_0
    test_unhappy_ends.py::test_closed_terminal_stops_nothing_and_no_file_takes_its_place
    test_unhappy_ends.py::test_lines_that_a_full_disk_swallowed_are_counted_and_nothing_stops
    test_logs.py::test_closed_or_missing_stderr_stops_nothing
D29 the main loop is stuck
    test_story_frozen.py::test_main_loop_that_hangs_is_told_by_the_age_of_its_last_beat
    test_unhappy_ends.py::test_stopped_daemon_is_not_responding_and_recovers
    test_story_frozen.py::test_pull_lane_that_hangs_in_a_call_is_told
D30 nothing is mirrored although all looks well
    test_story_frozen.py::test_failing_outside_is_told_within_15_minutes_by_state_log_and_health
    test_story_frozen.py::test_lists_that_nobody_polls_any_more_are_told_although_no_part_fails
    test_story_frozen.py::test_one_patient_who_is_never_listed_is_told_after_a_day_and_others_go_on
"""

HOSTILE_INPUT = """
E01 paths in names: parents, absolute, shares, drives
    test_catalogue_hostile.py::test_hundred_thousand_hostile_names_leave_nothing_but_an_extension
    test_story_listing.py::test_hostile_file_name_is_never_a_path
    test_naming.py::test_hostile_name_leaves_nothing_but_an_extension
    test_naming.py::test_export_name_is_safe_on_every_system
E02 control characters, line ends, escapes and overrides in any text
    test_catalogue_hostile.py::test_hostile_texts_forge_no_line_of_the_log
    test_catalogue_hostile.py::test_hostile_texts_are_archived_as_they_are_and_never_obeyed
    test_catalogue_hostile.py::test_hostile_texts_stay_one_row_of_a_table
    test_logs.py::test_one_event_is_one_line_of_json_whatever_its_values
E03 texts that look like log lines or format strings
    test_catalogue_hostile.py::test_hostile_texts_forge_no_line_of_the_log
    test_logs.py::test_unlisted_keys_are_dropped_and_values_that_are_no_plain_words_blanked
    test_logs.py::test_exception_leaves_types_and_places_but_no_text_and_no_locals
E04 reserved names, trailing dots and spaces, streams
    test_catalogue_hostile.py::test_hundred_thousand_hostile_names_leave_nothing_but_an_extension
    test_story_listing.py::test_hostile_file_name_is_never_a_path
    test_naming.py::test_export_name_is_safe_on_every_system
E05 names of 255 bytes and more
    test_catalogue_hostile.py::test_names_of_ours_are_short_plain_and_differ_in_more_than_their_case
    test_story_listing.py::test_hostile_file_name_is_never_a_path
E06 names that differ only in case or composition
    test_catalogue_hostile.py::test_names_of_ours_are_short_plain_and_differ_in_more_than_their_case
E07 links in the drop or planted in the archive
    test_archive.py::test_symlink_in_the_way_is_not_followed
    test_drop.py::test_look_tells_files_from_everything_else
    test_catalogue_drop.py::test_folder_of_ours_that_became_a_link_is_not_emptied
E08 an extension that lies
    test_catalogue_hostile.py::test_bombs_and_programs_are_archived_byte_for_byte_and_never_opened
    test_story_faults.py::test_another_known_type_than_the_name_says_is_archived_and_flagged
    test_story_faults.py::test_web_page_under_an_image_name_is_never_archived
    test_naming.py::test_another_known_type_is_flagged_not_refused
E09 bombs: zip, image, PDF
    test_catalogue_hostile.py::test_bombs_and_programs_are_archived_byte_for_byte_and_never_opened
    test_catalogue_hostile.py::test_no_module_of_the_product_can_unpack_or_decode_a_file
E10 SQL in texts
    test_catalogue_hostile.py::test_hostile_texts_are_archived_as_they_are_and_never_obeyed
    test_catalog.py::test_text_of_a_filter_is_never_sql_or_a_pattern
E11 secrets sent back by the server
    test_leaks.py::test_nothing_leaks_whatever_goes_wrong
    test_leaks.py::test_commands_say_nothing_that_names_anybody
    test_api.py::test_error_tells_nothing_of_the_answer
E12 a million tiny documents of one patient
    test_catalogue_hostile.py::test_patient_with_hundreds_of_documents_holds_up_no_other_longer_than_for_as_many_requests
    test_catalogue_hostile.py::test_list_of_thousands_of_rows_is_read_in_bounded_memory
    test_index.py::test_the_next_duty_is_found_without_sorting_all_that_are_due
    why: memory and delay are bounded by a number of rows that a test can simulate; both grow with it, in a line
"""


@dataclass(frozen=True)
class Case:
    """One fault: its id, what happens, the tests (`FILE::NAME` below tests/), and why a broader one covers it."""

    id: str
    fault: str
    tests: tuple[str, ...]
    why: str = ""


def read(table: str) -> list[Case]:
    """The cases of a table in order, as often as they stand in it."""
    cases = []
    for block in re.split(r"\n(?=\S)", table.strip()):
        first, *rest = block.splitlines()
        name, fault = first.split(" ", 1)
        lines = [line.strip() for line in rest]
        tests = tuple(line for line in lines if not line.startswith("why: "))
        why = " ".join(line.removeprefix("why: ") for line in lines if line.startswith("why: "))
        cases.append(Case(name, fault, tests, why))
    return cases


CASES = [case for t in (API_TRANSPORT, API_MEANING, DROP_SITE, LOCAL_MACHINE, HOSTILE_INPUT) for case in read(t)]
