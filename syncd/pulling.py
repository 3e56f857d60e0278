"""The pull lane: what was placed on the drop becomes versions in the archive; the drop is left as it was found.

Its work is the rows of table `attempt`, so a crash between any two steps heals: a placed file is pulled again, a
published one is found in the archive, a cleaned name is looked for once more.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from syncd import destroy, repair, upload
from syncd.cleaning import Cleaner
from syncd.diff import DAY, Owing
from syncd.errors import ItemError, SiteError, SyncdError, TransientError
from syncd.model import KIND_OF, Attempt, FieldValue, Item, PlacedName, Pulled, PullJob, Version
from syncd.naming import check_body, extension_of, media_type, plain_name, properly_ended
from syncd.placing import count_failure, image_revision, images_denied, thumbnail_revision, thumbnails_failed
from syncd.publishing import Arrival, Outcomes, Publisher, image_lacks
from syncd.scrub import adopt_newer
from syncd.sites import LANE_OF, Doors, Sites, claim_archive, settle_audit
from syncd.upkeep import Mark, Upkeep, publish_index

BATCH = 64  # placements looked at at once
IN_HAND = 96  # files on their way, unless one placement brought more
FILES = 48  # files recorded in one transaction, unless one placement brought more: the other lane waits for it
CAP = 2 << 30  # bytes: larger files are refused
IDLE = 0.25
LOOK_AGAIN = 300.0  # an unanswered placement is judged five minutes after it was asked for
AFTER_A_CUT = 60.0  # seconds after the site is tried again; four times as long each time
CUTS = 3  # then a file that is the first not to end once more, while others end, counts as one that cannot be read
LONG, MANY = 3600.0, 4096  # seconds, files: then one call takes nothing more along, and all else has its turn
PULL_AGAIN = (2.0, 5.0, 15.0)  # seconds: a site may show a file some time after the 201
WAITABLE = frozenset({"missing_on_drop", "changed_while_read", "zero_bytes", "unreadable_on_drop"})
NOT_READ = frozenset({"changed_while_read", "unreadable_on_drop", "io_error"})  # the office made it: we did not get it
DROP_SWEPT_EVERY = DAY
ARCHIVE_SEEN_EVERY = 300.0
CUT_SHORT = {"mount-images": "cut"}  # by our own end: that says nothing about the size of the mount
METHODS = {"mount-images": "DownloadMount", "thumbnails": "Thumbnails"}


@dataclass(frozen=True, slots=True)
class Target:
    """One file to pull for an attempt. `named`: what a folder answer called it."""

    attempt: Attempt
    item: Item
    remote: bytes
    named: PlacedName | None
    local: Path


Result = tuple[Target, Version | SyncdError]


@dataclass(slots=True)
class _Hand:
    """What one call of the drop has in hand: placements not settled yet, and all files in the order of their jobs."""

    open: dict[int, tuple[Attempt, list[Target]]] = field(default_factory=dict)
    known: set[int] = field(default_factory=set)
    targets: list[Target] = field(default_factory=list)
    outcomes: dict[Path, Pulled | SyncdError] = field(default_factory=dict)
    well: bool = True

    def whole(self) -> Iterator[list[tuple[Attempt, list[Target]]]]:
        """Placements whose files have all ended, FILES at once; they are no longer in hand."""
        some: list[tuple[Attempt, list[Target]]] = []
        for attempt, targets in list(self.open.values()):
            if all(target.local in self.outcomes for target in targets):
                if some and sum(len(each) for _, each in some) + len(targets) > FILES:
                    yield some
                    some = []
                some.append(self.open.pop(attempt.id))
        if some:
            yield some

    def cut(self, well: bool) -> None:
        """The connection is lost, by what is the first again and again while the site is `well` but for such files."""
        left = [target for target in self.targets if isinstance(self.outcomes.get(target.local), TransientError)]
        self.well = well or any(isinstance(each, Pulled) for each in self.outcomes.values())
        if self.well and left and left[0].attempt.looks >= CUTS:
            its = [target.local for target in left if target.attempt.id == left[0].attempt.id]
            self.outcomes |= dict.fromkeys(its, ItemError("unreadable_on_drop"))


class PullLane:
    """Turns without thread or sleep: `turn(now)` does one batch and says when it wants the next."""

    def __init__(self, doors: Doors, sites: Sites) -> None:
        self._doors, self._sites = doors, sites
        self._publisher, self.cleaner = Publisher(doors), Cleaner(doors)
        self._upkeep = Upkeep(doors, sites)
        self._recovered = self._long = False
        self._archive_seen_at = 0.0

    @property
    def received(self) -> int:
        """Bytes that came from the drop so far."""
        return self._doors.drop.received

    def turn(self, now: float) -> float:
        """Pull what is placed, judge what went unanswered, clean; seconds since the epoch of the next turn."""
        self._sites.look_again()
        self._settle_audit(now)
        wait = self._sites.wait_until("drop", "archive")
        try:
            if not (archive_waits := self._sites.wait_until("archive") > now):
                if not self._recovered:  # before its trouble may end: then the other lane goes on, too
                    self._recover(now)
                self._destroy(now)
            if wait > now or self._sites.reason("database") == "other_database":
                if not archive_waits and self._archive_unseen(now):
                    self._see_archive(now)  # nothing is done there, but its trouble begins and ends
                busy = self._recovered and self._sites.reason("archive") is None and self._upkeep.turn(now)
            else:
                self._long = False
                busy = self._turn(now)
                if not busy or self._long:
                    busy = self._upkeep.turn(now) or busy
        except (SiteError, TransientError) as error:
            self._sites.failed(error, now, lane=LANE_OF.get(error.reason, "drop"))
            return now + IDLE
        return now if busy else now + IDLE

    def _destroy(self, now: float) -> None:
        """Carry out what was ordered; what the disk does not let go is a state, and tried again. All else goes on."""
        if self._sites.wait_until("destroy") > now:
            return
        try:
            destroy.finish(self._doors.index, self._doors.archive, self._doors.log, self._doors.settings, now)
            self._sites.works("destroy", now)
        except (ItemError, SiteError) as error:
            named = error if isinstance(error, SiteError) else SiteError("archive_damaged")
            self._sites.failed(named, now, lane="destroy")

    def _settle_audit(self, now: float) -> None:
        """What both lanes did goes to the audit log; one that cannot be written is a state, and the work goes on."""
        if self._sites.wait_until("audit") > now:
            return
        try:
            if settle_audit(self._doors.index, self._doors.audit, now):
                self._sites.works("audit", now)
        except SiteError as error:
            self._sites.failed(error, now, lane="audit")

    def due(self, mark: Mark) -> None:
        """The scheduler says that something is due; the lane does it when it has nothing else to do."""
        self._upkeep.due(mark)

    def publish_index(self, now: float) -> None:
        """At the end of a backfill, when no turn is taken any more: what it brought is told to other programs."""
        if self._recovered and self._sites.reason("archive") is None:
            publish_index(self._doors, now)

    def start(self, now: float) -> None:
        """Before the first turn of any lane; an archive that is missing is a state, and the next turn tries again."""
        try:
            self._recover(now)
        except SiteError as error:
            self._sites.failed(error, now)

    def _recover(self, now: float) -> None:
        """Once at start: the archive is ours; requests in flight when the last process ended count as unanswered."""
        claim_archive(self._doors)
        self._doors.archive.clear_incoming()
        adopt_newer(self._doors, now)
        destroy.look_again(self._doors.index, self._doors.archive)
        for attempt in self._doors.index.attempts("asked"):
            why = CUT_SHORT.get(attempt.method, attempt.why)  # and when it was sent nobody knows: just now, at worst
            self._doors.index.set_attempt(attempt.id, "unanswered", now, why=why, asked_at=now)
        self._publisher.adopt_in_hand(now)
        self._recovered = True

    def _turn(self, now: float) -> bool:
        index = self._doors.index
        placed = index.attempts("placed", now, BATCH)
        if placed or self._archive_unseen(now):
            self._see_archive(now)
            repair.look_for_lost(index, self._doors.archive, self._doors.log, now)
        if self._sites.reason("drop"):
            self._doors.drop.look([self._doors.settings.drop.folder.encode()])
            if not placed:  # else its reading must show that the trouble is over: each broken one costs a login
                self._sites.works("drop", now)
        if placed:
            self._pull(placed)
            if not self._long:
                return True
        unanswered = index.attempts("unanswered", now, BATCH)
        for attempt in unanswered:
            self._judge(attempt, now)
        cleaning = index.attempts("cleaning", now, 4 * BATCH)
        if cleaning:  # an idle turn writes nothing
            self.cleaner.clean(cleaning, now)
        elif now - index.meta_time("drop_swept_at") > DROP_SWEPT_EVERY:
            self.cleaner.sweep(now)
        return bool(upload.stage(self._doors, now) or placed or unanswered or cleaning)

    def _archive_unseen(self, now: float) -> bool:
        """Also while nothing is placed: an unmounted disk is told within minutes."""
        return bool(self._sites.reason("archive")) or not 0 <= now - self._archive_seen_at < ARCHIVE_SEEN_EVERY

    def _see_archive(self, now: float) -> None:
        claim_archive(self._doors)
        self._archive_seen_at = now
        self._sites.works("archive", now)

    # --- pull, publish, record

    def _pull(self, attempts: Sequence[Attempt]) -> None:
        """Pull; publish what is whole while the rest is on its way, and take along what is placed meanwhile."""
        hand, until = _Hand(), self._doors.clock.now() + LONG
        well = self._sites.reason("drop") is None or all(each.looks for each in attempts)

        def finished(ended: Sequence[tuple[PullJob, Pulled | SyncdError]]) -> list[PullJob]:
            hand.outcomes |= {job.local: outcome for job, outcome in ended}
            if any(isinstance(outcome, TransientError) for _, outcome in ended):
                hand.cut(well)
            for some in hand.whole():  # each at its own time: a large file may be on its way for an hour
                self._publish(some, hand.outcomes, self._doors.clock.now())
            self._long |= len(hand.targets) >= MANY or self._doors.clock.now() > until
            more = bool(hand.open) and not self._long
            placed = self._doors.index.attempts("placed", self._doors.clock.now(), BATCH) if more else []
            return self._jobs(hand, [each for each in placed if each.id not in hand.known])

        try:
            outcomes = self._doors.drop.pull(self._jobs(hand, attempts), finished)
            finished([])  # what brought no file
        except BaseException:
            for target in hand.targets:  # pulled again, under another name
                self._doors.archive.discard(target.local)
            raise
        now = self._doors.clock.now()
        for target, outcome in zip(hand.targets, outcomes, strict=True):
            if isinstance(outcome, TransientError):  # perhaps this very file breaks the connection: others go first
                self._sites.failed(outcome, now, lane="drop")
                if (looks := target.attempt.looks) < CUTS or not hand.well:
                    again = max(now, self._sites.wait_until("drop")) + AFTER_A_CUT * 4**looks
                    looks = looks + 1 if hand.well else max(looks, 1)
                    self._doors.index.set_attempt(target.attempt.id, target.attempt.state, again, looks=looks)
                break
        else:
            self._sites.works("drop", now)

    def _jobs(self, hand: _Hand, attempts: Sequence[Attempt]) -> list[PullJob]:
        """Take placements in hand, as many as may be; no two files of one item: the second has to know of the first."""
        jobs: list[PullJob] = []
        for attempt in attempts:
            found = self._targets(attempt)
            busy = {target.item for _, targets in hand.open.values() for target in targets}
            room = not hand.open or len(busy) + len(found) <= IN_HAND
            if room and busy.isdisjoint(target.item for target in found):
                hand.open[attempt.id] = attempt, found
                hand.known.add(attempt.id)
                hand.targets += found
                jobs += [PullJob(target.remote, target.local, CAP) for target in found]
        return jobs

    def _publish(
        self,
        taken: Sequence[tuple[Attempt, list[Target]]],
        outcomes: Mapping[Path, Pulled | SyncdError],
        now: float,
    ) -> None:
        targets = [target for _, found in taken for target in found]
        checked = [self._checked(target, outcomes[target.local]) for target in targets]
        arrivals = [arrival for arrival in checked if isinstance(arrival, Arrival)]
        done: set[int] = set()

        def settle(published: Outcomes) -> None:
            results = iter(published)
            said = [next(results) if isinstance(each, Arrival) else each for each in checked]
            by_attempt: dict[int, list[Result]] = {a.id: [] for a, _ in taken}
            for target, result in zip(targets, said, strict=True):
                by_attempt[target.attempt.id].append((target, result))
            done.update(each.id for each, _ in taken if self._settled(each, by_attempt[each.id], now))

        self._publisher.take(arrivals, now, settle)
        with suppress(TransientError):  # the connection went meanwhile, of which the pull tells; cleaned later
            self.cleaner.clean([each for each in self._doors.index.attempts("cleaning", now) if each.id in done], now)

    def _targets(self, attempt: Attempt) -> list[Target]:
        new = self._doors.archive.new_incoming
        if not attempt.staging.endswith("/"):
            return [Target(attempt, _item(attempt), attempt.staging.encode(), None, new())]
        folder = attempt.staging.encode()
        if attempt.method not in METHODS:  # a document of unknown name: whatever the office wrote into its own folder
            names = self.cleaner.names(folder) or []
            return [Target(attempt, _item(attempt), folder + names[0], None, new())] if len(names) == 1 else []
        known, placed = self._documents(attempt.pat_num), self._named(attempt)
        said = Counter(each for named in placed for each in (named.file_name, named.doc_num))
        twice = {each for each, times in said.items() if times > 1}  # names and numbers: nobody knows whose file it is
        return [
            Target(attempt, _image(attempt, named), folder + named.file_name.encode(), named, new())
            for named in placed
            if twice.isdisjoint((named.file_name, named.doc_num))
            and plain_name(named.file_name)
            and (attempt.method != "thumbnails" or named.doc_num in known)
        ]

    def _named(self, attempt: Attempt) -> tuple[PlacedName, ...]:
        """What a folder answer named, once, without what was destroyed by order: that is not even read."""
        destroyed = self._doors.index.is_destroyed
        return tuple(each for each in dict.fromkeys(attempt.names) if not destroyed(_image(attempt, each)))

    def _documents(self, pat_num: int) -> set[int]:
        sql = "SELECT num FROM item WHERE pat_num = ? AND kind = 'document'"
        return {row["num"] for row in self._doors.index.rows(sql, pat_num)}

    def _checked(self, target: Target, outcome: Pulled | SyncdError) -> Arrival | SyncdError:
        """Whether a pulled file may be archived, and as what."""
        if isinstance(outcome, SyncdError):
            return outcome
        attempt = target.attempt
        answered = attempt.state == "placed"
        file_name = target.named.file_name if target.named else cast("str | None", attempt.listed.get("file_name"))
        if file_name is None and attempt.staging.endswith("/"):
            file_name = target.remote.rpartition(b"/")[2].decode(errors="replace")
        extension = {"mount": "jpg", "sheet": "pdf"}.get(attempt.method) or extension_of(file_name)
        try:
            flags = upload.flags_of(self._doors.index, target.item)
            flags += check_body(outcome.head, outcome.tail, outcome.size, extension, answered)
        except ItemError as error:
            self._doors.archive.discard(target.local)
            return error
        if not answered and not properly_ended(outcome.head, outcome.tail):
            self._doors.archive.discard(target.local)
            return ItemError("timeout_60s")
        fields: Mapping[str, FieldValue] = json.loads(str(attempt.listed.get("fields") or "{}"))
        source, named_revision = self._source(target)
        return Arrival(
            item=target.item,
            source=target.local,
            sha256=outcome.sha256,
            bytes=outcome.size,
            extension=extension,
            media_type=media_type(outcome.head, extension),
            revision=named_revision or attempt.revision,
            file_name=file_name,
            listed_at=attempt.listed_at,
            placed_at=attempt.placed_at or attempt.asked_at,
            method=METHODS.get(attempt.method, "DownloadSftp"),
            listing=fields if target.named is None else {"DocNum": target.item.num, "FileName": file_name},
            flags=flags,
            mount_num=attempt.num
            if attempt.method == "mount-images"
            else cast("int | None", attempt.listed.get("mount_num")),
            mount_images=tuple(n.doc_num for n in self._named(attempt)) if attempt.method == "mount-images" else None,
            source_revision=source,
            refetch=attempt.why == "refetch",
        )

    def _source(self, target: Target) -> tuple[str | None, str | None]:
        """What an image in a mount, or a thumbnail, was made from, and the revision that follows."""
        if target.named is None:
            return None, None
        if target.attempt.method == "mount-images":
            mount_revision = target.attempt.revision
            return mount_revision, image_revision(mount_revision, target.named.file_name)
        sql = "SELECT sha256 FROM item WHERE pat_num = ? AND kind = 'document' AND num = ?"
        made_from = str(self._doors.index.value(sql, target.item.pat_num, target.item.num) or "")
        return made_from, thumbnail_revision(made_from, target.named.file_name)

    # --- what became of an attempt, inside the transaction that records its files

    def _settled(self, attempt: Attempt, results: Sequence[Result], now: float) -> bool:
        """Whether nothing more is to be read of this attempt; its duty is fulfilled, or has failed once more."""
        index = self._doors.index
        failures = [result for _, result in results if isinstance(result, SyncdError)]
        if any(isinstance(failure, TransientError) for failure in failures):
            return False
        lost = attempt.method not in METHODS and not results
        failure = "missing_on_drop" if lost else next((f.failure for f in failures if isinstance(f, ItemError)), None)
        if failure in WAITABLE and attempt.looks < len(PULL_AGAIN) and attempt.state == "placed":
            index.set_attempt(attempt.id, "placed", now + PULL_AGAIN[attempt.looks], looks=attempt.looks + 1)
            return False
        late = {"placed_at": None} if failure == "missing_on_drop" else {}  # it may come yet: emptied again later
        index.set_attempt(attempt.id, "cleaning", now, looks=0, **late)
        if attempt.method == "thumbnails":
            self._thumbnails_settled(attempt, results, now)
            return True
        duty = index.duty(attempt.method, attempt.pat_num, attempt.num)
        if denied := images_denied(self._doors, attempt, now):
            failure = "missing_on_drop"
        if attempt.method == "mount-images" and not denied:
            self._images_settled(attempt, [t.item.num for t, said in results if isinstance(said, Version)], now)
        elif failure is not None or failures:
            if duty is not None:
                count_failure(self._doors, duty, failure or "io_error", now)
            return True
        index.duty_done(attempt.method, attempt.pat_num, attempt.num, attempt.revision)
        if duty is not None and duty.failures:
            self._doors.log.info("item_recovered", item=_item(attempt).full_id, failures=duty.failures)
        return True

    def _thumbnails_settled(self, attempt: Attempt, results: Sequence[Result], now: float) -> None:
        """An answered call settles every image archived before it, named or not, but those whose file was not read.

        An answer that names nothing of this patient's came from another database: it is asked for again tomorrow.
        """
        index, pat_num = self._doors.index, attempt.pat_num
        names = self._named(attempt)
        if names and self._documents(pat_num).isdisjoint(name.doc_num for name in names):
            index.run("UPDATE patient SET thumbnails_after_at = ? WHERE pat_num = ?", attempt.asked_at + DAY, pat_num)
            return
        left = [target.item.num for target, said in results if isinstance(said, ItemError) and said.failure in NOT_READ]
        sql = "UPDATE item SET thumbnail_due = 0 WHERE pat_num = ? AND thumbnail_due = 1 AND archived_at <= ?"
        sql += " AND num NOT IN (SELECT value FROM json_each(?))"
        index.run(sql, pat_num, attempt.asked_at, json.dumps(left))
        if left:
            thumbnails_failed(self._doors, pat_num, now)
        else:
            index.run("UPDATE patient SET thumbnails_after_at = 0, thumbnails_failures = 0 WHERE pat_num = ?", pat_num)
        count = sum(isinstance(said, Version) for _, said in results)
        self._doors.log.info("thumbnails_settled", pat_num=pat_num, count=count)

    def _images_settled(self, attempt: Attempt, archived: Sequence[int], now: float) -> None:
        """What a whole mount brought is archived; what it has no more goes, what left the listing is found here."""
        index, mount = self._doors.index, Item(attempt.pat_num, "mount", attempt.num)
        self._publisher.images_are_whole(mount, attempt.revision, now)
        named = {name.doc_num for name in self._named(attempt)}
        for num in named.difference(archived):  # two of one name, or a name no site takes: fetched by itself
            image = Item(attempt.pat_num, "mount-image", num)
            index.put_unlisted(image, attempt.num, image_revision(attempt.revision, str(num)), now)
            index.owe(Owing("mount-image", image, image_revision(attempt.revision, str(num)), now), "listed", now)
        for num in named:
            image = Item(attempt.pat_num, "mount-image", num)
            index.is_back(image, now)
            index.set_item(image, "mount_num = ?", attempt.num)  # perhaps it was in another one
            left, became = index.known_item(Item(attempt.pat_num, "document", num)), image.full_id
            if left is not None and left.missing_since_at is not None and not left.vanished:
                index.vanish(left.item, now, became)
                self._doors.log.info("item_moved", item=left.item.full_id, became=became)
        sql = "SELECT num FROM item WHERE pat_num = ? AND mount_num = ? AND vanished_at IS NULL"
        for row in index.rows(sql, attempt.pat_num, attempt.num):
            if row["num"] not in named:
                image_lacks(self._doors, Item(attempt.pat_num, "mount-image", row["num"]), now)

    # --- placements without an answer

    def _judge(self, attempt: Attempt, now: float) -> None:
        """Look at once, look again five minutes after the request: used only if untouched and properly ended."""
        judged_at = attempt.asked_at + LOOK_AGAIN
        seen = None if attempt.staging.endswith("/") else self._doors.drop.look([attempt.staging.encode()])[0]
        if now < judged_at:
            columns = {"seen_size": seen.size, "seen_mtime": seen.mtime} if seen else {}
            self._doors.index.set_attempt(attempt.id, "unanswered", judged_at, looks=1, **columns)
            return
        if seen is not None and attempt.seen == (seen.size, seen.mtime):
            self._pull([attempt])
            sql = "SELECT 1 FROM attempt WHERE id = ? AND state = 'unanswered' AND next_look_at <= ?"
            if self._doors.index.value(sql, attempt.id, now) is None:  # else it did not prove to be whole
                return
        self._give_up(attempt, now)

    def _give_up(self, attempt: Attempt, now: float) -> None:
        index = self._doors.index
        with index.transaction():
            index.set_attempt(attempt.id, "cleaning", now, looks=0)
            if attempt.method == "thumbnails":
                thumbnails_failed(self._doors, attempt.pat_num, now)
                return
            duty = index.duty(attempt.method, attempt.pat_num, attempt.num)
            if duty is None:
                return
            failure = "mount_too_large" if attempt.method == "mount-images" and attempt.why != "cut" else "timeout_60s"
            if failure == duty.failure == "mount_too_large" and self._singly(attempt, now):
                return
            count_failure(self._doors, duty, failure, now)
            sql = "UPDATE duty SET next_try_at = min(next_try_at, ?) WHERE pat_num = ? AND method = ? AND num = ?"
            index.run(f"{sql} AND failures < 3", now, duty.pat_num, duty.method, duty.num)

    def _singly(self, attempt: Attempt, now: float) -> bool:
        """A mount too large for 60 s: each known image by itself, if any is known; tomorrow it is asked again."""
        index = self._doors.index
        sql = "SELECT num, file_name FROM item WHERE pat_num = ? AND mount_num = ? AND vanished_at IS NULL"
        for row in (images := index.rows(sql, attempt.pat_num, attempt.num)):
            image = Item(attempt.pat_num, "mount-image", row["num"])
            newer = image_revision(attempt.revision, row["file_name"] or str(row["num"]))
            index.owe(Owing("mount-image", image, newer, now), "listed", now)
        if images:
            mount = Item(attempt.pat_num, "mount", attempt.num)
            self._publisher.images_are_whole(mount, attempt.revision, now)
            if attempt.why != "refetch":
                index.set_item(mount, "refetch_at = min(refetch_at, ?)", now + DAY)
            index.duty_done(attempt.method, attempt.pat_num, attempt.num)
        return bool(images)


def _item(attempt: Attempt) -> Item:
    return Item(attempt.pat_num, KIND_OF[attempt.method], attempt.num)


def _image(attempt: Attempt, named: PlacedName) -> Item:
    return Item(attempt.pat_num, "mount-image" if attempt.method == "mount-images" else "thumbnail", named.doc_num)
