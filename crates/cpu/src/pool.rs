//! Threads that compute one job at a time, together with the thread that asks for it.
//!
//! A token is hundreds of jobs of some ten to some hundred microseconds, one after the other. A thread that slept between them
//! would lose a good part of each, so threads look for the next job for [`SPIN`] before they go to sleep; no
//! longer, for another program may want the processor.

use std::any::Any;
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle, Thread};
use std::time::{Duration, Instant};

/// How long a thread looks for the next job, or for the end of one, before it sleeps: longer than what lies between two
/// jobs of a token, shorter than anybody notices.
const SPIN: Duration = Duration::from_micros(50);

thread_local! {
    static IN_A_JOB: Cell<bool> = const { Cell::new(false) };
}

/// The threads beside the one that calls [`Pool::run`].
pub(crate) struct Pool {
    shared: Arc<Shared>,
    helpers: Vec<JoinHandle<()>>,
    /// One job at a time.
    running: Mutex<()>,
}

/// What threads have in common.
struct Shared {
    /// [`State`] as a number.
    state: AtomicU32,
    /// The job to which the state's tickets belong: only who has taken one may look.
    job: AtomicPtr<Job>,
    /// For each helper: whether it sleeps, or is about to.
    sleeps: Vec<AtomicBool>,
    is_over: AtomicBool,
}

/// Work that several threads do at once, each until none is left.
struct Job {
    work: *const (dyn Fn() + Sync),
    caller: Thread,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

/// How a job stands.
#[derive(Clone, Copy)]
struct State {
    /// Helpers that may still join.
    tickets: u16,
    /// Helpers that have joined and not yet finished.
    inside: u16,
}

impl State {
    const ONE_INSIDE: u32 = 1;
    const TICKETS: u32 = 0xffff << 16;

    fn of(word: u32) -> State {
        State { tickets: (word >> 16) as u16, inside: word as u16 }
    }

    fn word(self) -> u32 {
        u32::from(self.tickets) << 16 | u32::from(self.inside)
    }
}

impl Pool {
    /// A pool in which `threads` threads compute: the caller, and one fewer helpers.
    ///
    /// # Errors
    /// The system refuses a thread.
    pub(crate) fn new(threads: usize) -> std::io::Result<Pool> {
        let helpers = threads.clamp(1, usize::from(u16::MAX)) - 1;
        let shared = Arc::new(Shared {
            state: AtomicU32::new(State { tickets: 0, inside: 0 }.word()),
            job: AtomicPtr::default(),
            sleeps: (0..helpers).map(|_| AtomicBool::new(false)).collect(),
            is_over: AtomicBool::new(false),
        });
        let mut pool = Pool { shared, helpers: Vec::with_capacity(helpers), running: Mutex::new(()) };
        for helper in 0..helpers {
            let shared = pool.shared.clone();
            let builder = thread::Builder::new().name(format!("infall-cpu-{helper}"));
            pool.helpers.push(builder.spawn(move || shared.help(helper))?);
        }
        Ok(pool)
    }

    /// Threads that compute.
    pub(crate) fn threads(&self) -> usize {
        self.helpers.len() + 1
    }

    /// Calls `work` here and on up to `threads - 1` helpers at once, and returns when all of them have returned. `work` takes
    /// its share from wherever it likes until nothing is left. If it panics anywhere, so does this.
    ///
    /// Panics inside of another job: one of the same pool would wait for itself.
    pub(crate) fn run(&self, threads: usize, work: &(dyn Fn() + Sync)) {
        assert_outside_of_jobs();
        let _alone = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: only the lifetime changes. Helpers follow the pointer between taking a ticket of this job and leaving it;
        // below, this function returns or unwinds only after tickets were withdrawn and every helper inside has left.
        let work_of_job = unsafe { std::mem::transmute::<&(dyn Fn() + Sync), &'static (dyn Fn() + Sync)>(work) };
        let mut job = Job { work: work_of_job, caller: thread::current(), panic: Mutex::new(None) };
        let tickets = threads.clamp(1, self.threads()) - 1;
        self.shared.publish(&mut job, tickets as u16);
        for (sleeps, helper) in self.shared.sleeps.iter().zip(&self.helpers).take(tickets) {
            if sleeps.swap(false, Ordering::SeqCst) {
                helper.thread().unpark();
            }
        }
        let result = in_a_job(work);
        self.shared.withdraw();
        if let Some(panic) = result.err().or(job.panic.into_inner().unwrap_or_else(PoisonError::into_inner)) {
            resume_unwind(panic);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.is_over.store(true, Ordering::SeqCst);
        for helper in self.helpers.drain(..) {
            helper.thread().unpark();
            // A helper hands every panic to the job's caller.
            let _ = helper.join();
        }
    }
}

impl Shared {
    /// Lets `tickets` helpers join `job`.
    fn publish(&self, job: &mut Job, tickets: u16) {
        let before = State::of(self.state.load(Ordering::Relaxed));
        debug_assert_eq!((before.tickets, before.inside), (0, 0), "one job at a time");
        self.job.store(job, Ordering::Relaxed);
        self.state.store(State { tickets, inside: 0 }.word(), Ordering::SeqCst);
    }

    /// Lets nobody join any more, and waits for those that have.
    fn withdraw(&self) {
        let mut state = self.state.fetch_and(!State::TICKETS, Ordering::SeqCst);
        let spin_until = Instant::now() + SPIN;
        while State::of(state).inside > 0 {
            if Instant::now() < spin_until {
                pause()
            } else {
                thread::park()
            }
            state = self.state.load(Ordering::Acquire);
        }
    }

    /// A helper's life.
    fn help(&self, helper: usize) {
        let mut spin_until = Instant::now();
        while !self.is_over.load(Ordering::SeqCst) {
            if self.join() {
                spin_until = Instant::now() + SPIN;
            } else if Instant::now() < spin_until {
                pause();
            } else {
                self.sleep(helper);
                spin_until = Instant::now() + SPIN;
            }
        }
    }
}

impl Shared {
    /// Computes with the others if a job has a ticket left, unless others were faster; whether there was one.
    fn join(&self) -> bool {
        let word = self.state.load(Ordering::Acquire);
        let state = State::of(word);
        if state.tickets == 0 {
            return false;
        }
        let joined = State { tickets: state.tickets - 1, inside: state.inside + 1 }.word();
        if self.state.compare_exchange(word, joined, Ordering::AcqRel, Ordering::Relaxed).is_err() {
            return true;
        }
        let job = self.job.load(Ordering::Relaxed);
        // SAFETY: the exchange took a ticket, so a job with tickets is published, and its pointer was stored before its tickets
        // were (the exchange acquires what `publish` released). No other pointer is stored, and `run` keeps this job and its
        // work alive, while a helper is inside: since the exchange, and until `leave`.
        let (work, panic, caller) = unsafe { (&*(*job).work, &(*job).panic, (*job).caller.clone()) };
        if let Err(found) = in_a_job(work) {
            panic.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(found);
        }
        self.leave(&caller);
        true
    }

    /// Touches nothing of the job any more.
    fn leave(&self, caller: &Thread) {
        let before = State::of(self.state.fetch_sub(State::ONE_INSIDE, Ordering::AcqRel));
        if before.inside == 1 && before.tickets == 0 {
            caller.unpark();
        }
    }

    /// Until there is a job, or for no reason.
    fn sleep(&self, helper: usize) {
        let sleeps = &self.sleeps[helper];
        sleeps.store(true, Ordering::SeqCst);
        // Whoever publishes looks at `sleeps` after it has stored the state, and this looks at the state after `sleeps`.
        let has_tickets = State::of(self.state.load(Ordering::SeqCst)).tickets > 0;
        if !has_tickets && !self.is_over.load(Ordering::SeqCst) {
            thread::park();
        }
        sleeps.store(false, Ordering::SeqCst);
    }
}

/// Panics inside of a job.
pub(crate) fn assert_outside_of_jobs() {
    assert!(!IN_A_JOB.get(), "work that is shared cannot share its own");
}

/// Does this thread's part of a job.
fn in_a_job(work: &(dyn Fn() + Sync)) -> Result<(), Box<dyn Any + Send>> {
    IN_A_JOB.set(true);
    let result = catch_unwind(AssertUnwindSafe(work));
    IN_A_JOB.set(false);
    result
}

/// A moment in which a neighbour on the same core can compute.
fn pause() {
    for _ in 0..4 {
        std::hint::spin_loop();
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::sync::Barrier;
    use std::sync::atomic::AtomicUsize;

    use super::*;

    /// Numbers below `count`, each handed out once.
    fn count_to(count: usize, threads: usize, pool: &Pool) -> Vec<usize> {
        let (next, seen) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
        pool.run(threads, &|| {
            loop {
                let i = next.fetch_add(1, Ordering::Relaxed);
                if i >= count {
                    break;
                }
                seen.lock().unwrap().push(i);
            }
        });
        let mut seen = seen.into_inner().unwrap();
        seen.sort_unstable();
        seen
    }

    #[test]
    fn everything_is_done_once_in_jobs_of_all_sizes() {
        let pool = Pool::new(4).unwrap();
        for round in 0..20_000 {
            let count = round % 23;
            assert_eq!(count_to(count, 1 + round % 5, &pool), (0..count).collect::<Vec<_>>());
            if round % 1000 == 0 {
                // Long enough for everybody to fall asleep.
                thread::sleep(SPIN * 4);
            }
        }
    }

    #[test]
    fn as_many_threads_as_asked_for_compute() {
        let pool = Pool::new(4).unwrap();
        for threads in [1, 2, 4] {
            let (seen, all_here) = (Mutex::new(HashSet::new()), Barrier::new(threads));
            pool.run(threads, &|| {
                all_here.wait();
                seen.lock().unwrap().insert(thread::current().id());
            });
            assert_eq!(seen.lock().unwrap().len(), threads);
        }
    }

    #[test]
    #[should_panic(expected = "work that is shared cannot share its own")]
    fn a_job_in_a_job_is_refused() {
        let pool = Pool::new(1).unwrap();
        pool.run(1, &|| pool.run(1, &|| ()));
    }

    #[test]
    fn jobs_from_several_threads_wait_for_each_other() {
        let pool = Pool::new(3).unwrap();
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..500).for_each(|_| assert_eq!(count_to(9, 3, &pool).len(), 9)));
            }
        });
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_goes_on() {
        let pool = Pool::new(2).unwrap();
        let caller = thread::current().id();
        for is_the_callers in [true, false] {
            let both_here = Barrier::new(2);
            let panicked = catch_unwind(AssertUnwindSafe(|| {
                pool.run(2, &|| {
                    both_here.wait();
                    assert_ne!((thread::current().id() == caller), is_the_callers, "as planned");
                });
            }));
            assert!(panicked.is_err());
            assert_eq!(count_to(100, 2, &pool).len(), 100);
        }
    }
}
