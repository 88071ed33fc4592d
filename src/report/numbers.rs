//! Numbers as reports print them: what is not finite as `inf`, `-inf` or `nan`.

use crate::artifact::BlockInterval;
use crate::units::non_finite;

/// Formats a count with thousands separators: `9,612`.
pub fn thousands(count: usize) -> String {
    let digits = count.to_string();
    let mut grouped = String::with_capacity(digits.len() + digits.len() / 3);
    for (idx, digit) in digits.chars().enumerate() {
        if idx > 0 && (digits.len() - idx).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped
}

/// Formats a number with four significant digits; far from 1 as a power of ten.
pub fn significant(value: f64) -> String {
    let magnitude = value.abs();
    if let Some(word) = non_finite(value) {
        word.to_owned()
    } else if magnitude == 0.0 {
        "0".to_owned()
    } else if !(1e-4..1e7).contains(&magnitude) {
        format!("{value:.3e}")
    } else {
        let n_decimals = (3.0 - magnitude.log10().floor()).max(0.0) as usize;
        format!("{value:.n_decimals$}")
    }
}

/// Formats `mean ± spread` with as many decimals as the spread's two leading digits need, far below 1 as powers of ten;
/// without a spread the value alone.
pub fn with_spread(value: f64, spread: Option<f64>) -> String {
    match spread.filter(|spread| *spread > 0.0 && spread.is_finite() && value.is_finite()) {
        None => significant(value),
        Some(spread) if spread < 1e-5 => format!("{} ± {spread:.1e}", significant(value)),
        Some(spread) => {
            let n_decimals = (1.0 - spread.log10().floor()).clamp(0.0, 6.0) as usize;
            format!("{value:.n_decimals$} ± {spread:.n_decimals$}")
        }
    }
}

/// Formats a value with its 95 % interval, as [`with_ends`]; without an interval the value alone.
pub fn with_interval(value: f64, interval: Option<(f64, f64)>) -> String {
    interval.map_or_else(|| significant(value), |(low, high)| with_ends(value, low, high))
}

/// Formats a value with the interval that blocks of text give.
pub fn with_block_interval(value: f64, interval: Option<&BlockInterval>) -> String {
    with_interval(value, interval.map(|found| (found.low, found.high)))
}

/// Formats `value [low, high]` with as many decimals as three leading digits of half the width need; the value alone where an end is not finite or there is no width.
pub fn with_ends(value: f64, low: f64, high: f64) -> String {
    let half_width = (high - low) / 2.0;
    if !(half_width > 0.0 && half_width.is_finite() && value.is_finite()) {
        return significant(value);
    }
    if half_width < 1e-5 {
        return format!("{value:.2e} [{low:.2e}, {high:.2e}]");
    }
    let n_decimals = (2.0 - half_width.log10().floor()).clamp(0.0, 6.0) as usize;
    format!("{value:.n_decimals$} [{low:.n_decimals$}, {high:.n_decimals$}]")
}

/// Formats a change as signed percentages, with its interval: `+44.9 % [+30.1, +61.0]`; with more decimals where that is narrow.
pub fn percent_change_within(ratio: f64, ends: Option<(f64, f64)>) -> String {
    let Some((low, high)) = ends.filter(|(low, high)| low.is_finite() && high.is_finite() && ratio.is_finite()) else {
        return percent_change(ratio);
    };
    let half_width = 50.0 * (high - low);
    let n_decimals = if half_width > 0.0 { (1.0 - half_width.log10().floor()).clamp(1.0, 6.0) as usize } else { 1 };
    let percent = |ratio: f64| {
        let percent = (ratio - 1.0) * 100.0;
        format!("{}{:.n_decimals$}", if percent < 0.0 { "−" } else { "+" }, percent.abs())
    };
    format!("{} % [{}, {}]", percent(ratio), percent(low), percent(high))
}

/// Formats a number with so many decimals.
pub fn decimals(value: f64, n_decimals: usize) -> String {
    non_finite(value).map_or_else(|| format!("{value:.n_decimals$}"), str::to_owned)
}

/// Formats bytes in MiB, the unit of comparison tables; small models keep their digits.
pub fn mib(bytes: u64) -> String {
    let value = bytes as f64 / (1024.0 * 1024.0);
    if value >= 100.0 { format!("{value:.1} MiB") } else { format!("{value:.3} MiB") }
}

/// Formats a change as a signed percentage: `+26.0 %`.
pub fn percent_change(ratio: f64) -> String {
    if let Some(word) = non_finite(ratio) {
        return format!("{word} %");
    }
    let percent = (ratio - 1.0) * 100.0;
    let sign = if percent < 0.0 { "−" } else { "+" };
    format!("{sign}{:.1} %", percent.abs())
}

/// Formats a ratio: `0.31x`.
pub fn times(ratio: f64) -> String {
    if let Some(word) = non_finite(ratio) {
        format!("{word}x")
    } else if ratio >= 10.0 {
        format!("{ratio:.1}x")
    } else {
        format!("{ratio:.2}x")
    }
}

/// Formats a ratio with its 95 % interval: `1.20x [1.18, 1.22]`.
pub fn times_with_interval(ratio: f64, low: f64, high: f64) -> String {
    let half = (high - low) / 2.0;
    if !(ratio.is_finite() && half > 0.0 && half.is_finite()) {
        return times(ratio);
    }
    let n_decimals = (1.0 - half.log10().floor()).clamp(1.0, 4.0) as usize;
    format!("{ratio:.n_decimals$}x [{low:.n_decimals$}, {high:.n_decimals$}]")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_well() {
        assert_eq!(
            [thousands(0), thousands(999), thousands(9612), thousands(1_234_567)],
            ["0", "999", "9,612", "1,234,567"]
        );
        assert_eq!(with_spread(9.0614, Some(0.2134)), "9.06 ± 0.21");
        assert_eq!(with_spread(1432.6, Some(38.2)), "1433 ± 38");
        assert_eq!(with_spread(9.0614, None), "9.061");
        assert_eq!(with_interval(15374.2, Some((14950.3, 15811.0))), "15374 [14950, 15811]");
        assert_eq!(with_interval(0.81237, Some((0.78541, 0.84))), "0.8124 [0.7854, 0.8400]");
        assert_eq!(with_interval(9.0614, None), "9.061");
        assert_eq!(times_with_interval(1.2, 1.1974, 1.2026), "1.2000x [1.1974, 1.2026]");
        assert_eq!(times_with_interval(0.769, 0.751, 0.788), "0.769x [0.751, 0.788]");
        assert_eq!(with_spread(2.6142e-6, Some(7.09e-8)), "2.614e-6 ± 7.1e-8");
        assert_eq!(
            [0.0, 0.00351234, 1.2e-5, 14.5, 12676.4].map(significant),
            ["0", "0.003512", "1.200e-5", "14.50", "12676"]
        );
        let odd = [f64::INFINITY, f64::NEG_INFINITY, f64::NAN];
        assert_eq!(odd.map(significant), ["inf", "-inf", "nan"]);
        assert_eq!(odd.map(|value| with_spread(value, Some(0.5))), ["inf", "-inf", "nan"]);
        assert_eq!(with_spread(9.0614, Some(f64::NAN)), "9.061");
        assert_eq!(
            (percent_change(f64::INFINITY), times(f64::NAN), decimals(f64::NAN, 3)),
            ("inf %".into(), "nanx".into(), "nan".into())
        );
        assert_eq!(mib(1_044_992), "0.997 MiB");
        assert_eq!([percent_change(1.26), percent_change(0.5)], ["+26.0 %", "−50.0 %"]);
        assert_eq!(percent_change_within(1.449, Some((1.301, 1.61))), "+44.9 % [+30.1, +61.0]");
        assert_eq!(percent_change_within(1.01, Some((0.98, 1.04))), "+1.0 % [−2.0, +4.0]");
        assert_eq!(percent_change_within(1.0012, Some((1.0008, 1.0016))), "+0.120 % [+0.080, +0.160]");
        assert_eq!(percent_change_within(1.01, None), "+1.0 %");
        assert_eq!(with_ends(9.0614, 8.521, 9.634), "9.061 [8.521, 9.634]");
        assert_eq!(with_ends(2.614e-6, 2.4e-6, 2.8e-6), "2.61e-6 [2.40e-6, 2.80e-6]");
        assert_eq!([with_ends(1.0, 1.0, 1.0), with_ends(f64::INFINITY, 1.0, 2.0)], ["1.000", "inf"]);
        assert_eq!([times(0.3141), times(12.34)], ["0.31x", "12.3x"]);
    }
}
