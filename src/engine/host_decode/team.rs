//! A team of the pool's threads for many short phases: handing one out costs a few atomic operations, where a parallel iterator
//! wakes threads each time.
//!
//! The calling thread leads and works; helpers join when the pool gets to them. Chunks are claimed one by one, so that a phase ends
//! with or without helpers: nested and concurrent teams on one pool can't wait for each other.

use rayon::Scope;
use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

/// Rounds of waiting before a thread offers its processor to others: some 100 µs.
const SPINS: u32 = 1 << 12;

/// A phase's work: called once for each chunk, from any thread.
type Work<'a> = &'a (dyn Fn(usize) + Sync);

/// Threads that run phases together.
pub struct Team {
    /// Unclaimed chunks of the current phase, as a range: its start in the lower half, its end in the upper one. The
    /// leader takes the first, helpers take the last, so that each reads memory that lies together.
    unclaimed: AtomicU64,
    /// Chunks of the current phase that are done.
    n_done: AtomicUsize,
    /// What the current phase does.
    work: UnsafeCell<Work<'static>>,
    is_over: AtomicBool,
}

// SAFETY: `work` is written by the leader alone, while every chunk of the phase before is done and none is left to claim; others
// read it only between claiming a chunk and counting it as done.
unsafe impl Sync for Team {}

impl Team {
    /// Runs `body` as the leader of a team of as many threads as the pool has.
    pub fn lead<R>(body: impl FnOnce(&mut Leader<'_, '_>) -> R) -> R {
        let team = Team {
            unclaimed: AtomicU64::new(0),
            n_done: AtomicUsize::new(0),
            work: UnsafeCell::new(&|_| {}),
            is_over: AtomicBool::new(false),
        };
        rayon::in_place_scope(|scope| body(&mut Leader { team: &team, scope, has_helpers: false }))
    }

    fn claim_first(&self) -> Option<usize> {
        self.claim(|start, end| range(start + 1, end)).map(|(start, _)| start)
    }

    fn claim_last(&self) -> Option<usize> {
        self.claim(|start, end| range(start, end - 1)).map(|(_, end)| end - 1)
    }

    /// Replaces the range of unclaimed chunks, unless it is empty, and returns what it was.
    fn claim(&self, rest: impl Fn(usize, usize) -> u64) -> Option<(usize, usize)> {
        let bounds = |range: u64| (range as u32 as usize, (range >> 32) as usize);
        let take = |before| {
            let (start, end) = bounds(before);
            (start < end).then(|| rest(start, end))
        };
        self.unclaimed.fetch_update(Ordering::AcqRel, Ordering::Acquire, take).ok().map(bounds)
    }

    fn do_chunk(&self, chunk_idx: usize, work: Work<'_>) {
        // Counts the chunk even if it panics: a waiting thread must not wait forever.
        let _done = Done(&self.n_done);
        work(chunk_idx);
    }

    /// Works until the leader is through.
    fn help(&self) {
        let mut n_waited = 0;
        while !self.is_over.load(Ordering::Acquire) {
            match self.claim_last() {
                None => wait(&mut n_waited),
                Some(chunk_idx) => {
                    n_waited = 0;
                    // SAFETY: the phase can't end before the claimed chunk is done, so the leader neither writes `work` now nor leaves
                    // what it refers to.
                    self.do_chunk(chunk_idx, unsafe { *self.work.get() });
                }
            }
        }
    }
}

/// The thread that hands out phases.
pub struct Leader<'a, 'team> {
    team: &'team Team,
    scope: &'a Scope<'team>,
    /// Helpers were called: when there first was something to share.
    has_helpers: bool,
}

impl<'team> Leader<'_, 'team> {
    /// Does `work` for each of the chunks `0..n_chunks`, and returns when all are done.
    pub fn run(&mut self, n_chunks: usize, work: Work<'_>) {
        if n_chunks < 2 {
            return (0..n_chunks).for_each(work);
        }
        let team: &'team Team = self.team;
        if !self.has_helpers {
            self.has_helpers = true;
            (1..rayon::current_num_threads()).for_each(|_| self.scope.spawn(|_| team.help()));
        }
        // SAFETY: no chunk of the phase before is left, so no thread reads `work`. `phase` waits for claimed chunks however this call
        // ends: the reference is not used any more when what it refers to is gone.
        unsafe { *team.work.get() = std::mem::transmute::<Work<'_>, Work<'static>>(work) };
        team.n_done.store(0, Ordering::Relaxed);
        let _phase = Phase { team, n_chunks };
        team.unclaimed.store(range(0, n_chunks), Ordering::Release);
        while let Some(chunk_idx) = team.claim_first() {
            team.do_chunk(chunk_idx, work);
        }
    }
}

impl Leader<'_, '_> {
    /// Fills `out` in chunks of `chunk_len` values: `work` is given each one's first index and its place.
    pub fn fill(&mut self, out: &mut [f32], chunk_len: usize, work: &(dyn Fn(usize, &mut [f32]) + Sync)) {
        /// Sends a pointer to threads that write to places of their own behind it.
        struct Out(*mut f32);
        // SAFETY: each chunk is claimed once, and its slice is its own.
        unsafe impl Sync for Out {}
        let len = out.len();
        let out = Out(out.as_mut_ptr());
        let out = &out;
        self.run(len.div_ceil(chunk_len), &|chunk_idx| {
            let first = chunk_idx * chunk_len;
            // SAFETY: `first` is below `len`, chunks don't overlap, and `out` is borrowed until all are done.
            let chunk = unsafe { std::slice::from_raw_parts_mut(out.0.add(first), chunk_len.min(len - first)) };
            work(first, chunk);
        });
    }
}

impl Drop for Leader<'_, '_> {
    fn drop(&mut self) {
        self.team.is_over.store(true, Ordering::Release);
    }
}

struct Done<'a>(&'a AtomicUsize);

impl Drop for Done<'_> {
    fn drop(&mut self) {
        self.0.fetch_add(1, Ordering::AcqRel);
    }
}

/// A phase that is running; ends it when dropped.
struct Phase<'a> {
    team: &'a Team,
    n_chunks: usize,
}

impl Drop for Phase<'_> {
    fn drop(&mut self) {
        // Chunks are left only where the leader panicked.
        let left = self.team.unclaimed.swap(0, Ordering::AcqRel);
        let n_left = (left >> 32) as usize - left as u32 as usize;
        let mut n_waited = 0;
        while self.team.n_done.load(Ordering::Acquire) + n_left < self.n_chunks {
            wait(&mut n_waited);
        }
    }
}

/// Returns chunks `start..end` as one word; a phase has far fewer than 2³² of them.
fn range(start: usize, end: usize) -> u64 {
    (end as u64) << 32 | start as u64
}

fn wait(n_waited: &mut u32) {
    if *n_waited < SPINS {
        *n_waited += 1;
        std::hint::spin_loop();
    } else {
        std::thread::yield_now();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rayon::prelude::*;

    fn counts(n_phases: usize, n_chunks: usize) -> Vec<usize> {
        let counts: Vec<AtomicUsize> = (0..n_chunks).map(|_| AtomicUsize::new(0)).collect();
        Team::lead(|leader| {
            for _ in 0..n_phases {
                leader.run(n_chunks, &|chunk_idx| {
                    counts[chunk_idx].fetch_add(1, Ordering::Relaxed);
                });
            }
        });
        counts.into_iter().map(AtomicUsize::into_inner).collect()
    }

    #[test]
    fn every_chunk_of_every_phase_is_done_once() {
        for n_chunks in [0, 1, 2, 3, 17] {
            assert_eq!(counts(2_000, n_chunks), vec![2_000; n_chunks]);
        }
    }

    #[test]
    fn a_phase_sees_what_the_one_before_wrote() {
        let cells: Vec<AtomicUsize> = (0..8).map(|_| AtomicUsize::new(0)).collect();
        Team::lead(|leader| {
            for round in 0..2_000 {
                leader.run(8, &|i| cells[i].store(cells[i].load(Ordering::Relaxed) + 1, Ordering::Relaxed));
                leader.run(8, &|i| assert_eq!(cells[7 - i].load(Ordering::Relaxed), round + 1));
            }
        });
    }

    #[test]
    fn a_slice_is_filled_whole_and_each_place_once() {
        for (n, chunk_len) in [(0, 4), (1, 4), (103, 10), (100, 10), (7, 100)] {
            let mut out = vec![0.0f32; n];
            Team::lead(|leader| {
                leader.fill(&mut out, chunk_len, &|first, part| {
                    part.iter_mut().enumerate().for_each(|(i, value)| *value += (first + i) as f32);
                });
            });
            assert_eq!(out, (0..n).map(|i| i as f32).collect::<Vec<_>>());
        }
    }

    #[test]
    fn teams_inside_the_pool_and_beside_each_other_all_end() {
        (0..8).into_par_iter().for_each(|_| assert_eq!(counts(200, 5), vec![200; 5]));
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| assert_eq!(counts(200, 5), vec![200; 5]));
            }
        });
    }

    #[test]
    fn a_panic_in_a_chunk_reaches_the_caller() {
        for bad in 0..4 {
            let run = || Team::lead(|leader| leader.run(4, &|chunk_idx| assert_ne!(chunk_idx, bad)));
            assert!(std::panic::catch_unwind(run).is_err());
        }
    }
}
