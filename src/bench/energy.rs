//! Energy per token from the movements of a board's counter: how long work must go on, and the arithmetic.

use crate::inference::EnergyWindow;
use crate::metrics::statistics;

/// Energy is counted over at least this long: a movement is seen some ms late at both ends, which is then below 1 %.
pub const SHORTEST_S: f64 = 2.0;
/// Movements of the counter that must be seen after the first.
pub const FEWEST_UPDATES: usize = 20;
/// Work is repeated for no longer than this.
pub const LONGEST_S: f64 = 10.0;
/// Equal parts of a window, each of two movements at least, whose spread is given.
pub const N_WINDOWS: usize = 10;

/// Why there is no figure of energy.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum NoEnergy {
    #[error("the board tells neither energy nor power")]
    NoSource,
    #[error(
        "{n_updates} movements of the counter were seen over {covered_s:.1} s; a figure needs {FEWEST_UPDATES} over {SHORTEST_S} s"
    )]
    TooShort { n_updates: usize, covered_s: f64 },
    #[error(
        "filling the context took as much energy as all of the work: what is left for the tokens is not above zero"
    )]
    AllFill,
    #[error("the first start reads it")]
    OfFirstStart,
}

/// Mean power over a window and over its parts.
#[derive(Debug, Clone, PartialEq)]
struct Powers {
    mean_w: f64,
    parts_w: [f64; N_WINDOWS],
    n_updates: usize,
}

/// Work that was repeated without a pause while energy was read.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Repeated {
    pub window: EnergyWindow,
    pub n_repetitions: usize,
}

/// What a token took.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenEnergy {
    pub joules_mean: f64,
    /// Over `N_WINDOWS` parts of the window.
    pub joules_stdev: Option<f64>,
    pub n_updates: usize,
    /// Tokens of the repetitions, and how long they took.
    pub n_tokens: usize,
    pub tokens_s: f64,
    pub method: String,
}

/// Returns true once a window is long enough for a figure.
pub fn is_enough(window: &EnergyWindow) -> bool {
    powers(window).is_ok()
}

/// Returns the energy per token of work that does `n_tokens` tokens at a time. Where each repetition had to fill a context first,
/// `fill` is that alone, repeated: its energy is taken off.
///
/// # Errors
/// Where the board gave no readings, or too few.
pub fn token_energy(work: &Repeated, fill: Option<&Repeated>, n_tokens: usize) -> Result<TokenEnergy, NoEnergy> {
    let (whole, whole_s) = (powers(&work.window)?, seconds_each(work));
    let (fill_w, fill_s, fill_updates) = match fill {
        Some(fill) => {
            let found = powers(&fill.window)?;
            ((found.mean_w, found.parts_w), seconds_each(fill), found.n_updates)
        }
        None => ((0.0, [0.0; N_WINDOWS]), 0.0, usize::MAX),
    };
    let each = |whole_w: f64, fill_w: f64| (whole_w * whole_s - fill_w * fill_s) / n_tokens as f64;
    let parts: Vec<f64> = whole.parts_w.iter().zip(fill_w.1).map(|(whole_w, fill_w)| each(*whole_w, fill_w)).collect();
    let joules_mean = each(whole.mean_w, fill_w.0);
    let tokens_s = (whole_s - fill_s) * work.n_repetitions as f64;
    if joules_mean <= 0.0 || tokens_s <= 0.0 {
        return Err(NoEnergy::AllFill);
    }
    let subtracted = if fill.is_some() { "; what filling the context takes, measured alone, is taken off" } else { "" };
    Ok(TokenEnergy {
        joules_mean,
        joules_stdev: statistics(&parts).and_then(|parts| parts.stdev),
        n_updates: whole.n_updates.min(fill_updates),
        n_tokens: n_tokens * work.n_repetitions,
        tokens_s,
        method: format!("{}{subtracted}", work.window.method),
    })
}

fn seconds_each(work: &Repeated) -> f64 {
    work.window.window_s / work.n_repetitions.max(1) as f64
}

/// Returns power between movements of the counter: what was used before the first and after the last has no known end.
fn powers(window: &EnergyWindow) -> Result<Powers, NoEnergy> {
    if !window.has_source {
        return Err(NoEnergy::NoSource);
    }
    let updates = &window.updates;
    let n_updates = updates.len().saturating_sub(1);
    let between = |first: (f64, f64), last: (f64, f64)| (last.1 - first.1) / (last.0 - first.0);
    let (Some(first), Some(last)) = (updates.first().copied(), updates.last().copied()) else {
        return Err(NoEnergy::TooShort { n_updates, covered_s: 0.0 });
    };
    if n_updates < FEWEST_UPDATES || last.0 - first.0 < SHORTEST_S {
        return Err(NoEnergy::TooShort { n_updates, covered_s: last.0 - first.0 });
    }
    let at = |part: usize| updates[part * n_updates / N_WINDOWS];
    let parts_w = std::array::from_fn(|part| between(at(part), at(part + 1)));
    Ok(Powers { mean_w: between(first, last), parts_w, n_updates })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Readings every `poll_s` of a counter that moves every `period_s` while the power is what `watts` says of the time.
    fn window(window_s: f64, period_s: f64, poll_s: f64, watts: impl Fn(f64) -> f64) -> EnergyWindow {
        let exact = |t: f64| (0..(t / 1e-4) as usize).map(|step| watts(step as f64 * 1e-4) * 1e-4).sum::<f64>();
        let counter = |t: f64| (t / period_s + 0.37).floor() * period_s;
        let (mut updates, mut last) = (Vec::new(), counter(0.0));
        for poll in 1..=(window_s / poll_s) as usize {
            let now = poll as f64 * poll_s;
            if counter(now) > last {
                last = counter(now);
                updates.push((now, exact((last - 0.37 * period_s).max(0.0))));
            }
        }
        EnergyWindow { window_s, updates, method: "scripted".to_owned(), has_source: true }
    }

    fn within(found: f64, wanted: f64, share: f64) -> bool {
        (found - wanted).abs() <= wanted * share
    }

    #[test]
    fn energy_is_within_5_percent_whatever_the_counters_period() {
        for (period_s, poll_s) in [(0.02, 0.005), (0.02, 0.05), (0.1, 0.005), (0.1, 0.05), (0.033, 0.007)] {
            // Passes of 70 ms at 500 W, each followed by 10 ms at 100 W: 36 J per 128 tokens.
            let watts = |t: f64| if t % 0.08 < 0.07 { 500.0 } else { 100.0 };
            let work = Repeated { window: window(2.4, period_s, poll_s, watts), n_repetitions: 30 };
            let found = token_energy(&work, None, 128).expect("a figure");
            assert!(within(found.joules_mean, 36.0 / 128.0, 0.05), "{period_s} {poll_s}: {found:?}");
            assert!(found.n_updates >= FEWEST_UPDATES && found.joules_stdev.is_some(), "{found:?}");
            assert_eq!((found.n_tokens, within(found.tokens_s, 2.4, 1e-9)), (3840, true));
        }
    }

    #[test]
    fn what_fills_a_context_is_taken_off() {
        // 40 ms of filling at 600 W, then 160 ms of decoding at 300 W: 48 J in 64 tokens.
        for period_s in [0.02, 0.1] {
            let watts = |t: f64| if t % 0.2 < 0.04 { 600.0 } else { 300.0 };
            let work = Repeated { window: window(2.6, period_s, 0.005, watts), n_repetitions: 13 };
            let fill = Repeated { window: window(2.4, period_s, 0.005, |_| 600.0), n_repetitions: 60 };
            let found = token_energy(&work, Some(&fill), 64).expect("a figure");
            assert!(within(found.joules_mean, 0.75, 0.05), "{period_s}: {found:?}");
            assert!(within(found.tokens_s, 13.0 * 0.16, 1e-9) && found.method.contains("taken off"), "{found:?}");
        }
        let fill = Repeated { window: window(2.4, 0.02, 0.005, |_| 600.0), n_repetitions: 1 };
        assert_eq!(token_energy(&fill, Some(&fill), 64), Err(NoEnergy::AllFill));
    }

    #[test]
    fn too_few_movements_or_too_little_time_give_no_figure() {
        let of = |window| token_energy(&Repeated { window, n_repetitions: 1 }, None, 1).expect_err("no figure");
        // 0.3 s against a counter of 20 to 100 ms, as short benchmarks are.
        assert!(matches!(of(window(0.3, 0.1, 0.005, |_| 300.0)), NoEnergy::TooShort { n_updates: 2, .. }));
        // Enough movements in too little time, and too few in enough of it.
        assert!(matches!(of(window(1.5, 0.02, 0.005, |_| 300.0)), NoEnergy::TooShort { n_updates: 74, .. }));
        let slow = of(window(5.0, 0.5, 0.005, |_| 300.0));
        assert!(slow.to_string().starts_with("9 movements of the counter were seen over 4.5 s"), "{slow}");
        assert!(matches!(of(EnergyWindow { has_source: true, ..EnergyWindow::default() }), NoEnergy::TooShort { .. }));
        assert_eq!(of(EnergyWindow::default()), NoEnergy::NoSource);
    }
}
