//! The work of the committing thread: from plans to transactions, and what to do when the kernel
//! says no.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use super::adopt::{Found, lay_out};
use super::affinity::{self, AT_ONCE, Forgotten};
use super::applied::{Applied, Step};
use super::blame::{
    Split, is_about_layout, is_denied, is_passing, is_surprise, is_unknown_flag, split,
};
use super::flows::{Suspects, Sweeper};
use super::listing;
use super::{Adoption, Change, CommitError, Report, Totals};
use crate::model::NodeContext;
use crate::netlink::{Batch, Error, Socket, TableFlags};
use crate::plan::{Desired, ServicePlan};
use crate::ruleset::{Contribution, PoolSlots, Subject, TABLE};

/// A subject and the contribution that it shall have.
pub(super) type Target = (Subject, Option<Contribution>);

/// How many subjects the first transaction of a new table takes; each one behind it doubles what
/// is there.
///
/// The kernel grows its hash tables in the background, on the CPU that asked for it, and gets to it
/// when that CPU is free: between transactions. In one transaction of a million elements, two
/// thirds of the time go into looking through a row of tables that wait to become one
/// (`rhashtable_insert_slow`).
const FIRST_PART: usize = 500;

/// How often a table is listed anew because it is not as it was just listed, before somebody is
/// blamed for that.
const SURPRISES: usize = 5;

/// Who was refused, and why.
pub type Refused = BTreeMap<Subject, CommitError>;

/// Owns the netlink socket, the plans and the applied state. [`super::Committer`] runs it on a
/// thread; benchmarks and `--once` call it directly.
pub struct Worker {
    socket: Socket,
    flags: TableFlags,
    desired: Desired,
    node: Contribution,
    applied: Applied,
    /// Whether the table is not as `applied` has it, or may not be.
    stale: bool,
    /// The ruleset's generation when the table was last listed, and how many transactions of ours
    /// had succeeded by then. Each transaction raises the generation by one, whoever makes it.
    listed: Option<(u32, usize)>,
    /// Subjects whose last commit the kernel refused: what it holds of them is older than what is
    /// desired. They are tried again with their next change or [`Worker::retry_refused`].
    refused: Refused,
    sweeper: Sweeper,
    /// Clients that are to be forgotten.
    forgotten: Vec<Forgotten>,
    totals: Totals,
    report: Box<dyn FnMut(Report) + Send>,
}

impl fmt::Debug for Worker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Worker").field("refused", &self.refused).finish_non_exhaustive()
    }
}

impl Worker {
    /// Opens the socket, in the network namespace of this thread. `report` hears what becomes of
    /// each subject that a commit touches.
    ///
    /// # Errors
    /// When the kernel has no nfnetlink.
    pub fn open(report: impl FnMut(Report) + Send + 'static) -> Result<Worker, Error> {
        Ok(Worker {
            socket: Socket::open()?,
            flags: TableFlags::OWNED,
            desired: Desired::default(),
            node: Contribution::Node(Arc::default()),
            applied: Applied::default(),
            stale: false,
            listed: None,
            refused: Refused::new(),
            sweeper: Sweeper::start(),
            forgotten: Vec::new(),
            totals: Totals::default(),
            report: Box::new(report),
        })
    }

    /// Makes a plain table that others may change, as on a kernel before Linux 6.9, which knows no
    /// owners. A table that has an owner already stays as it is.
    #[must_use]
    pub fn without_owner(mut self) -> Worker {
        self.flags = TableFlags::NONE;
        self
    }

    /// What the kernel holds, as of the last transaction.
    pub fn applied(&self) -> &Applied {
        &self.applied
    }

    /// Whether the kernel refuses some subject.
    pub fn has_refused(&self) -> bool {
        !self.refused.is_empty()
    }

    /// Whether the kernel's table is not known to be what it should be.
    pub fn is_stale(&self) -> bool {
        self.stale
    }

    /// What all transactions have cost so far.
    pub fn totals(&self) -> Totals {
        self.totals
    }

    /// Makes the kernel hold exactly what these plans ask for; see [`super::Committer::adopt`].
    pub fn adopt(
        &mut self,
        node: &NodeContext,
        plans: Vec<impl Into<Arc<ServicePlan>>>,
    ) -> Result<Adoption, CommitError> {
        self.desired = Desired::default();
        self.node = Contribution::node(node);
        for plan in plans {
            let plan: Arc<ServicePlan> = plan.into();
            self.desired.set_shared(&plan.service().clone(), Some(plan));
        }
        let adoption = self.resync().map_err(|error| CommitError::Kernel(Arc::new(error)))?;
        for subject in self.subjects() {
            self.report(&subject);
        }
        Ok(adoption)
    }

    /// Commits changes as one transaction; returns who was refused of all that they touch.
    pub fn commit(&mut self, changes: Vec<Change>) -> Refused {
        let mut touched = BTreeSet::new();
        for change in changes {
            match change {
                Change::Service(service, plan) => {
                    let services = self.desired.set(&service, plan);
                    touched.extend(services.into_iter().map(Subject::Service));
                }
                Change::Node(node) => {
                    self.node = Contribution::node(&node);
                    touched.insert(Subject::Node);
                }
            }
        }
        self.commit_subjects(&touched)
    }

    /// Tries once more what the kernel refused before.
    pub fn retry_refused(&mut self) {
        let subjects: BTreeSet<Subject> = self.refused.keys().cloned().collect();
        if !subjects.is_empty() {
            self.commit_subjects(&subjects);
        }
    }

    /// Takes the table over anew if it may not be as it was left. Who has the table to himself needs
    /// not look; on a kernel that knows no owners somebody else may have changed it if the ruleset
    /// has seen more transactions than ours.
    pub fn look_after(&mut self) {
        if self.stale || self.others_wrote() {
            self.stale = true;
            self.commit_subjects(&self.subjects());
        }
    }

    fn others_wrote(&mut self) -> bool {
        let (TableFlags::NONE, Some((then, transactions))) = (self.flags, self.listed) else {
            return false;
        };
        let ours = u32::try_from(self.totals.transactions - transactions).unwrap_or(u32::MAX);
        self.socket.generation().is_ok_and(|now| now != then.wrapping_add(ours))
    }

    /// Waits until the connections are deleted that may not go on, and all clients forgotten that
    /// are to be: half a minute where very many are remembered.
    pub fn finish_sweeps(&mut self) {
        self.sweeper.finish_with_clients();
        while self.forget_clients() {}
    }

    /// Waits until the connections are deleted that may not go on.
    pub fn finish_deletions(&mut self) {
        self.sweeper.finish();
        while self.forget_clients() {}
    }

    fn commit_subjects(&mut self, subjects: &BTreeSet<Subject>) -> Refused {
        let before: BTreeSet<Subject> = self.refused.keys().cloned().collect();
        let refused = if self.stale { self.catch_up(subjects) } else { self.try_commit(subjects) };
        for subject in subjects {
            match refused.get(subject) {
                Some(error) => self.refused.insert(subject.clone(), error.clone()),
                None => self.refused.remove(subject),
            };
        }
        // Who was not touched is refused now, or no longer, if the table was taken over anew.
        let now: BTreeSet<Subject> = self.refused.keys().cloned().collect();
        let others: BTreeSet<Subject> = before.symmetric_difference(&now).cloned().collect();
        for subject in subjects.union(&others) {
            self.report(subject);
        }
        refused
    }

    fn try_commit(&mut self, subjects: &BTreeSet<Subject>) -> Refused {
        // Of whom the kernel misses something in a table that was just listed, it will again: that
        // is no news of the table.
        let known = |subject: &Subject| match self.refused.get(subject) {
            Some(CommitError::Kernel(error)) => is_surprise(error),
            _ => false,
        };
        let (again, first): (Vec<&Subject>, Vec<&Subject>) =
            subjects.iter().partition(|subject| known(subject));
        let (mut refused, mut suspects) = (Refused::new(), Suspects::default());
        for (part, on_surprise) in [(first, Surprise::Resync), (again, Surprise::Refuse)] {
            let targets = part.into_iter().map(|subject| {
                let contribution = self.target(subject, |pool| {
                    let current = self.applied.contribution(subject)?;
                    current.slots_of(pool).cloned()
                });
                (subject.clone(), contribution)
            });
            let targets = targets.collect();
            self.commit_targets(targets, &mut refused, &mut suspects, on_surprise);
        }
        self.sweeper.sweep(suspects);
        refused.retain(|subject, _| subjects.contains(subject));
        refused
    }

    /// Takes the table over, of which it is not known what it holds, and with it everything that
    /// is desired.
    fn catch_up(&mut self, subjects: &BTreeSet<Subject>) -> Refused {
        match self.resync() {
            Ok(adoption) => {
                if adoption.operations > 0 {
                    let operations = adoption.operations;
                    tracing::warn!(operations, "the table was not as it was left; it is put right");
                }
                let refused = self.refused.iter().filter(|(subject, _)| subjects.contains(subject));
                refused.map(|(subject, error)| (subject.clone(), error.clone())).collect()
            }
            Err(error) => {
                let error = CommitError::Kernel(Arc::new(error));
                subjects.iter().map(|subject| (subject.clone(), error.clone())).collect()
            }
        }
    }

    /// Everybody who asks for something.
    fn subjects(&self) -> BTreeSet<Subject> {
        let services = self.desired.services().cloned().map(Subject::Service);
        services.chain(std::iter::once(Subject::Node)).collect()
    }

    /// The contribution that `subject` shall have.
    fn target(
        &self,
        subject: &Subject,
        slots: impl FnMut(&crate::plan::Pool) -> Option<PoolSlots>,
    ) -> Option<Contribution> {
        match subject {
            Subject::Node => Some(self.node.clone()),
            Subject::Service(service) => {
                self.desired.effective(service).map(|plan| Contribution::service(plan, slots))
            }
        }
    }

    /// Commits `targets` as one transaction, or in parts without those that are refused.
    fn commit_targets(
        &mut self,
        targets: Vec<Target>,
        refused: &mut Refused,
        suspects: &mut Suspects,
        on_surprise: Surprise,
    ) {
        // Every part that fails becomes smaller parts, so this ends.
        let mut parts = vec![targets];
        while let Some(targets) = parts.pop() {
            let mut batch = Batch::new(TABLE);
            let step = self.applied.stage(targets, &mut batch);
            let result = if batch.operations() == 0 { Ok(()) } else { self.send(batch) };
            let Err(error) = result else {
                self.install(step, suspects);
                continue;
            };
            // Who may change it may have changed it.
            self.stale |= is_denied(&error);
            if on_surprise == Surprise::Resync && is_surprise(&error) {
                tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    "the table is not as it was left: taking it over anew",
                );
                match self.resync() {
                    Ok(_) => refused.extend(self.refused.clone()),
                    Err(error) => {
                        let error = CommitError::Kernel(Arc::new(error));
                        let left = parts.into_iter().flatten().chain(step.into_changes());
                        refused.extend(left.map(|(subject, _)| (subject, error.clone())));
                    }
                }
                return;
            }
            match split(step.into_changes(), &error) {
                Split::Guilty(guilty, rest) => {
                    refuse_all(guilty, error, refused);
                    parts.extend((!rest.is_empty()).then_some(rest));
                }
                Split::Halves(first, second) => parts.extend([second, first]),
            }
        }
    }

    fn install(&mut self, step: Step, suspects: &mut Suspects) {
        for (subject, next) in step.changes() {
            suspects.note(self.applied.contribution(subject), next.as_ref());
        }
        let changes = step.changes();
        self.sweeper.settle(
            changes.iter().filter_map(|(subject, _)| self.applied.contribution(subject)),
            changes.iter().filter_map(|(_, next)| next.as_ref()),
        );
        self.applied.install(step);
    }

    /// Forgets some of the clients that are remembered for endpoints that serve them no more.
    /// Returns whether there are others.
    pub fn forget_clients(&mut self) -> bool {
        self.forgotten.extend(self.sweeper.forgotten());
        let chunk: Vec<Forgotten> =
            self.forgotten.drain(..AT_ONCE.min(self.forgotten.len())).collect();
        affinity::forget(chunk, |batch| self.send(batch));
        !self.forgotten.is_empty()
    }

    /// Has `wake` called whenever there is something for [`Worker::forget_clients`] to do.
    pub(super) fn wake_by(&self, wake: impl Fn() + Send + 'static) {
        self.sweeper.wake_by(wake);
    }

    /// Lists the table and makes it what is desired, whatever it holds. Subjects that the kernel
    /// refuses are left out, and what it held of them goes.
    fn resync(&mut self) -> Result<Adoption, Error> {
        let before = std::mem::take(&mut self.refused);
        let result = self.try_resync();
        self.stale = result.is_err();
        if self.stale {
            self.refused = before;
        }
        result
    }

    fn try_resync(&mut self) -> Result<Adoption, Error> {
        let subjects = self.subjects();
        let mut surprises = 0;
        let mut anew = false;
        // Each round leaves somebody out, is one of few, or is the last.
        for _ in 0..=subjects.len() + SURPRISES + 2 {
            let subjects: Vec<&Subject> =
                subjects.iter().filter(|s| !self.refused.contains_key(s)).collect();
            self.listed = Some((self.socket.generation()?, self.totals.transactions));
            let listing = listing::list(&mut self.socket)?;
            let present = listing.is_some();
            let found = listing.and_then(Found::new).filter(|found| self.keeps(found.flags()));
            let found = found.filter(|_| !anew);
            let kept = found.is_some();
            let mut targets: Vec<Target> = subjects
                .into_iter()
                .map(|subject| {
                    let slots = |pool: &_| found.as_ref().and_then(|found| found.slots_of(pool));
                    (subject.clone(), self.target(subject, slots))
                })
                .collect();

            // Where nothing is, nothing needs to change at once.
            let whole = if present { targets.len() } else { FIRST_PART.min(targets.len()) };
            let rest = targets.split_off(whole);
            let (error, targets) = match self.replace(found, present, targets) {
                Ok(adoption) => return Ok(self.load_rest(adoption, rest)),
                Err(failed) => failed,
            };
            if self.flags != TableFlags::NONE && is_unknown_flag(&error) {
                // Linux before 6.9: a plain table, which others can change.
                self.flags = TableFlags::NONE;
                continue;
            }
            if surprises < SURPRISES && (is_surprise(&error) || is_passing(&error)) {
                // Somebody changed the table since it was listed, or the kernel was short of
                // memory.
                surprises += 1;
                continue;
            }
            if is_about_layout(&error) && kept {
                // Something of an older day that the kernel does not delete by itself.
                anew = true;
                continue;
            }
            if is_about_layout(&error) || is_passing(&error) {
                return Err(error);
            }
            match split(targets, &error) {
                Split::Guilty(guilty, rest) if !rest.is_empty() && !is_denied(&error) => {
                    let mut refused = Refused::new();
                    refuse_all(guilty, error, &mut refused);
                    self.refused.extend(refused);
                }
                Split::Guilty(..) => return Err(error),
                Split::Halves(..) if is_denied(&error) => return Err(error),
                Split::Halves(first, second) => {
                    match self.resync_in_parts(present, [first, second, rest]) {
                        Err(error) if surprises < SURPRISES && is_surprise(&error) => {
                            surprises += 1;
                        }
                        result => return result,
                    }
                }
            }
        }
        Err(Error::Interrupted)
    }

    /// Whether a table with these flags can be kept. A plain one cannot be given an owner, but as
    /// long as this kernel knows owners, another one with an owner can take its place.
    fn keeps(&mut self, flags: TableFlags) -> bool {
        if self.flags == TableFlags::OWNED && flags == TableFlags::NONE && !self.knows_owners() {
            self.flags = TableFlags::NONE;
        }
        self.flags == TableFlags::NONE || flags != TableFlags::NONE
    }

    /// Whether the kernel knows tables with owners; told by one that goes with the transaction that
    /// makes it.
    fn knows_owners(&mut self) -> bool {
        let mut batch = Batch::new("portcullis-probe");
        batch.add_table(TableFlags::OWNED, None);
        batch.delete_table();
        self.send(batch).is_ok()
    }

    /// Adopts or lays out the table in one transaction.
    fn replace(
        &mut self,
        found: Option<Found>,
        present: bool,
        targets: Vec<Target>,
    ) -> Result<Adoption, (Error, Vec<Target>)> {
        let mut batch = Batch::new(TABLE);
        let replaced = found.is_none();
        let mut free = 0;
        let mut suspects = Suspects::default();
        match found {
            Some(found) => {
                if self.flags == TableFlags::OWNED {
                    // Also if there is nothing else to do and the table has an owner: if that is
                    // somebody else, the kernel says so now.
                    batch.add_table(self.flags, None);
                    free = batch.operations();
                }
                suspects.left = found.left();
                found.stage(&targets, &mut batch);
            }
            None => lay_out(present, self.flags, &targets, &mut batch),
        }
        let operations = batch.operations() - free;
        if batch.operations() > 0
            && let Err(error) = self.send(batch)
        {
            return Err((error, targets));
        }
        let come = targets.iter().filter_map(|(_, contribution)| contribution.as_ref());
        self.sweeper.settle(self.applied.contributions(), come);
        // Whatever there was to write: a daemon that was killed may have left what must not go on.
        suspects.lapsed.look_anywhere();
        for refused in self.refused.keys() {
            if let Some(wanted) = self.target(refused, |_| None) {
                suspects.left.spare(&wanted);
            }
        }
        for (_, contribution) in &targets {
            suspects.note(None, contribution.as_ref());
        }
        self.sweeper.sweep(suspects);
        self.applied = Applied::new(targets);
        Ok(Adoption { found: present, replaced, operations })
    }

    /// When the kernel refuses everything together and does not say who is at fault: the table
    /// without any Service, and then the Services by halves.
    fn resync_in_parts(
        &mut self,
        present: bool,
        parts: [Vec<Target>; 3],
    ) -> Result<Adoption, Error> {
        let node = vec![(Subject::Node, Some(self.node.clone()))];
        let adoption = self.replace(None, present, node).map_err(|(error, _)| error)?;
        Ok(self.load(adoption, parts))
    }

    /// Commits what a new table has not got yet, in transactions that grow.
    fn load_rest(&mut self, adoption: Adoption, rest: Vec<Target>) -> Adoption {
        let mut rest = rest.into_iter();
        let mut size = FIRST_PART;
        let parts = std::iter::from_fn(|| {
            let part: Vec<Target> = rest.by_ref().take(size).collect();
            size *= 2;
            (!part.is_empty()).then_some(part)
        });
        self.load(adoption, parts)
    }

    /// Commits each part by itself; whom the kernel refuses is left out.
    fn load(
        &mut self,
        adoption: Adoption,
        parts: impl IntoIterator<Item = Vec<Target>>,
    ) -> Adoption {
        let before = self.totals.operations;
        let (mut refused, mut suspects) = (Refused::new(), Suspects::default());
        for part in parts {
            self.commit_targets(part, &mut refused, &mut suspects, Surprise::Refuse);
        }
        self.sweeper.sweep(suspects);
        self.refused.extend(refused);
        let operations = adoption.operations + self.totals.operations - before;
        Adoption { operations, ..adoption }
    }

    /// Has the kernel do a transaction, and counts it.
    fn send(&mut self, batch: Batch) -> Result<(), Error> {
        let operations = batch.operations();
        let transaction = batch.finish();
        let begun = Instant::now();
        self.socket.commit_encoded(&transaction).inspect_err(|_| self.totals.refused += 1)?;
        self.totals.transactions += 1;
        self.totals.operations += operations;
        self.totals.bytes += transaction.size();
        self.totals.kernel_time += begun.elapsed();
        Ok(())
    }

    fn report(&mut self, subject: &Subject) {
        let plan = match subject {
            Subject::Node => None,
            Subject::Service(service) => self.desired.effective(service),
        };
        let refused = self.refused.get(subject).cloned();
        (self.report)(Report { subject: subject.clone(), refused, plan });
    }
}

/// What to do when the table is not as it was left.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Surprise {
    /// List it and take it over anew.
    Resync,
    /// Treat it as any refusal, because it was just listed.
    Refuse,
}

fn refuse_all(targets: Vec<Target>, error: Error, refused: &mut Refused) {
    let error = CommitError::Kernel(Arc::new(error));
    refused.extend(targets.into_iter().map(|(subject, _)| (subject, error.clone())));
}
