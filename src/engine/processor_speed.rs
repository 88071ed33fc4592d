//! How fast the processors run beside what is timed: a few microseconds of known work, against the best time for it.
//!
//! A clock that was lowered slows it, and so does another program on the second hardware thread of a core: on a virtual machine nothing
//! else tells of either.

use crate::inference::Threads;
use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Steps of the known work: some 3.5 µs at 4 GHz.
const STEPS: u32 = 2_000;
/// An interrupt is in one of so many tries at most.
const TRIES: usize = 3;

/// How long a process works to learn how fast its processors can be.
const LEARNING: Duration = Duration::from_millis(20);

/// The best that this process knows of.
static BEST: Mutex<BestSpeeds> = Mutex::new(BestSpeeds { of_one: BTreeMap::new(), of_all: BTreeMap::new() });

/// Returns the lowest share of its best speed at which a processor of these threads runs now.
pub fn processor_speed(threads: Threads) -> f64 {
    let speeds = match threads {
        Threads::Calling => vec![(current_cpu(), speed())],
        Threads::All => rayon::broadcast(|_| (current_cpu(), speed())),
    };
    BEST.lock().unwrap_or_else(PoisonError::into_inner).lowest_share(threads, &speeds)
}

/// Learns how fast the processors can be, and returns it as text for [`know_processor_speeds`].
pub fn processor_speeds() -> String {
    let start = Instant::now();
    while start.elapsed() < LEARNING {
        processor_speed(Threads::All);
        processor_speed(Threads::Calling);
    }
    BEST.lock().unwrap_or_else(PoisonError::into_inner).to_string()
}

/// Takes over what another process learned.
///
/// # Errors
/// Where the text is not that of [`processor_speeds`].
pub fn know_processor_speeds(text: &str) -> Result<(), String> {
    BEST.lock().unwrap_or_else(PoisonError::into_inner).extend(&text.parse()?);
    Ok(())
}

/// The best speed of each processor, in steps per microsecond: where one of them worked, and where all did, which lowers their clocks.
#[derive(Debug, Clone, PartialEq, Default)]
struct BestSpeeds {
    of_one: BTreeMap<usize, f64>,
    of_all: BTreeMap<usize, f64>,
}

impl BestSpeeds {
    /// Notes the speeds of processors and returns the lowest share of the best so far.
    fn lowest_share(&mut self, threads: Threads, speeds: &[(usize, f64)]) -> f64 {
        let BestSpeeds { of_one, of_all } = self;
        let mut share = |&(cpu, speed): &(usize, f64)| {
            let (table, other) = match threads {
                Threads::Calling => (&mut *of_one, &*of_all),
                Threads::All => (&mut *of_all, &*of_one),
            };
            // One that worked beside others is no faster alone: its speed then is a lower bound of the best.
            let known = if threads == Threads::Calling { other.get(&cpu).copied() } else { None };
            let best = table.entry(cpu).or_insert(known.unwrap_or(speed));
            *best = best.max(speed);
            speed / *best
        };
        speeds.iter().map(&mut share).fold(1.0, f64::min)
    }

    /// Takes over what is better in `other`.
    fn extend(&mut self, other: &BestSpeeds) {
        let pairs = |table: &BTreeMap<usize, f64>| table.iter().map(|(cpu, speed)| (*cpu, *speed)).collect::<Vec<_>>();
        self.lowest_share(Threads::All, &pairs(&other.of_all));
        self.lowest_share(Threads::Calling, &pairs(&other.of_one));
    }
}

/// Reads `0:571.2,1:570.9;0:560.1`: processors and their best speeds, alone and beside others.
impl std::str::FromStr for BestSpeeds {
    type Err = String;

    fn from_str(text: &str) -> Result<BestSpeeds, String> {
        let pair = |pair: &str| -> Option<(usize, f64)> {
            let (cpu, speed) = pair.split_once(':')?;
            Some((cpu.parse().ok()?, speed.parse().ok()?))
        };
        let table = |text: &str| -> Option<BTreeMap<usize, f64>> {
            text.split(',').filter(|text| !text.is_empty()).map(pair).collect()
        };
        let tables = text.split_once(';').and_then(|(one, all)| Some((table(one)?, table(all)?)));
        let (of_one, of_all) = tables.ok_or_else(|| format!("{text:?} is no list of processors and speeds"))?;
        Ok(BestSpeeds { of_one, of_all })
    }
}

impl std::fmt::Display for BestSpeeds {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let table = |table: &BTreeMap<usize, f64>| {
            table.iter().map(|(cpu, speed)| format!("{cpu}:{speed}")).collect::<Vec<_>>().join(",")
        };
        write!(out, "{};{}", table(&self.of_one), table(&self.of_all))
    }
}

/// Returns steps per microsecond on the processor that this thread runs on.
fn speed() -> f64 {
    let mut best = f64::INFINITY;
    for _ in 0..TRIES {
        let start = Instant::now();
        std::hint::black_box(work(std::hint::black_box(STEPS)));
        best = best.min(start.elapsed().as_secs_f64());
    }
    f64::from(STEPS) / (best * 1e6)
}

/// Eight chains that do not wait for one another, so that what limits it is how many instructions the processor takes in at once: what a
/// second thread of the same core takes its share of.
fn work(n_steps: u32) -> u64 {
    let mut chains = [1u64, 2, 3, 4, 5, 6, 7, 8];
    for step in 0..n_steps {
        for chain in &mut chains {
            *chain = chain.rotate_left(7).wrapping_add(*chain ^ u64::from(step));
        }
    }
    chains.iter().fold(0, |sum, chain| sum ^ chain)
}

#[cfg(target_os = "linux")]
fn current_cpu() -> usize {
    rustix::thread::sched_getcpu()
}

#[cfg(not(target_os = "linux"))]
fn current_cpu() -> usize {
    0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_is_of_the_best_that_this_processor_has_shown() {
        let mut best = BestSpeeds::default();
        let mut all = |speeds: &[(usize, f64)]| best.lowest_share(Threads::All, speeds);
        assert_eq!([all(&[(0, 400.0)]), all(&[(0, 200.0)]), all(&[(0, 500.0)])], [1.0, 0.5, 1.0]);
        // Another processor may be of another kind.
        assert_eq!(all(&[(0, 400.0), (1, 100.0)]), 0.8);
        // Alone it may be faster, which says nothing of all at once.
        assert_eq!(best.lowest_share(Threads::Calling, &[(0, 250.0)]), 0.5);
        assert_eq!(best.lowest_share(Threads::Calling, &[(0, 600.0)]), 1.0);
        assert_eq!(best.lowest_share(Threads::All, &[(0, 500.0)]), 1.0);
        let mut other: BestSpeeds = "2:50;0:450,1:200".parse().expect("speeds");
        other.extend(&best);
        assert_eq!(other.to_string(), "0:600,2:50;0:500,1:200");
        assert_eq!(other.to_string().parse(), Ok(other));
        assert!("0".parse::<BestSpeeds>().is_err() && ";".parse() == Ok(BestSpeeds::default()));
    }

    #[test]
    fn processors_have_a_speed() {
        for threads in [Threads::Calling, Threads::All] {
            let share = processor_speed(threads);
            assert!(share > 0.0 && share <= 1.0, "{share}");
        }
    }
}
