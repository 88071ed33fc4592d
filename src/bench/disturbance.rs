//! Whether something else disturbed a measurement. It decides from figures alone.
//!
//! Bounds are measured: docs/definitions.md#disturbance.

use crate::artifact::{DeviceUse, HostFigures};
use crate::inference::{FULL_SPEED, QUIET_CPUS};

/// Time that the most delayed computing thread waited for a processor.
const WAITING_SHARE: f64 = 0.05;
/// Processor time that the hypervisor gave to others.
const STEAL_SHARE: f64 = 0.05;
/// Times in `/proc/stat` are whole hundredths of a second for each processor: less than this tells nothing.
const LEAST_CPU_S: f64 = 0.03;
/// A GPU's clock under its highest, where it names no limit of its own as the cause.
const CLOCK_SHARE: f64 = 0.8;
/// Samples of clocks, ends of regions among them, of which most lie within work.
const LEAST_SAMPLES: usize = 10;
/// Other processes' share of the device, in percent. Idle ones hold memory and take nothing.
const UTILIZATION: f64 = 0.02;

/// What NVML names when the device is too hot or its supply fails. A power cap or chosen clocks are how the device is set up.
const FAULTS: [&str; 4] = ["hw_slowdown", "hw_thermal_slowdown", "sw_thermal_slowdown", "hw_power_brake_slowdown"];
const LIMITS: [&str; 4] = ["applications_clocks_setting", "display_clock_setting", "sw_power_cap", "sync_boost"];

/// Why a measurement counts as disturbed.
#[derive(Debug, Clone, PartialEq)]
pub struct Reason {
    /// In words: `others took 0.97 of 2 CPUs`. Several are joined by semicolons.
    pub text: String,
    /// The most that a figure is above its bound, as a multiple: of two attempts the one with less is kept.
    pub severity: f64,
}

/// Returns why a measurement was disturbed; `None` if nothing says so. `is_host` is true where the host's processors compute: others
/// on them then matter also where no thread is seen waiting, since they take caches and memory bandwidth.
pub fn disturbance(host: Option<&HostFigures>, device: Option<&DeviceUse>, is_host: bool) -> Option<Reason> {
    let mut found: Vec<Reason> = Vec::new();
    found.extend(host.into_iter().flat_map(|host| host_reasons(host, is_host)));
    found.extend(device.into_iter().flat_map(device_reasons));
    let severity = found.iter().map(|reason| reason.severity).reduce(f64::max)?;
    let texts: Vec<String> = found.into_iter().map(|reason| reason.text).collect();
    Some(Reason { text: texts.join("; "), severity })
}

fn host_reasons(host: &HostFigures, is_host: bool) -> Vec<Reason> {
    let n_cpus = host.n_cpus as f64;
    let cpu_s = host.window_s * n_cpus;
    let over = |share: Option<f64>, bound: f64, of_s: f64, text: &dyn Fn(f64) -> String| {
        let share = share.filter(|share| *share >= bound && share * of_s >= LEAST_CPU_S)?;
        Some(Reason { text: text(share), severity: share / bound })
    };
    let others = host.others_cpu_share.filter(|_| is_host);
    let others = over(others, QUIET_CPUS / n_cpus, cpu_s, &|share| {
        format!("others took {:.2} of {} CPUs", share * n_cpus, host.n_cpus)
    });
    // Threads wait for one another too, but for others no longer than those ran.
    let of_others = host
        .others_cpu_share
        .map(|others| n_cpus * (others + host.steal_share.unwrap_or(0.0) + host.labpipe_cpu_share.unwrap_or(0.0)));
    let waiting = host.waiting_share.map(|waiting| waiting.min(of_others.unwrap_or(waiting)));
    let waiting = over(waiting, WAITING_SHARE, host.window_s, &|share| {
        format!("it waited for a CPU {:.0} % of the time", share * 100.0)
    });
    let steal = over(host.steal_share, STEAL_SHARE, cpu_s, &|share| {
        format!("the hypervisor took {:.0} % of the CPUs", share * 100.0)
    });
    let thermal = host
        .n_thermal_events
        .filter(|n| *n > 0 && is_host)
        .map(|n| Reason { text: format!("the CPU was slowed down by heat ({n} events)"), severity: 1.0 });
    let speed = host.processor_speed_min.filter(|speed| *speed < FULL_SPEED && is_host).map(|speed| Reason {
        text: format!("a processor ran at {:.0} % of its speed", speed * 100.0),
        severity: FULL_SPEED / speed.max(0.01),
    });
    [others, waiting, steal, speed, thermal].into_iter().flatten().collect()
}

fn device_reasons(device: &DeviceUse) -> Vec<Reason> {
    let mut found = Vec::new();
    let faults: Vec<&str> =
        device.throttle_reasons.iter().map(String::as_str).filter(|reason| FAULTS.contains(reason)).collect();
    if !faults.is_empty() {
        found.push(Reason { text: format!("the device was throttled ({})", faults.join(", ")), severity: 2.0 });
    }
    let is_limited = device.throttle_reasons.iter().any(|reason| LIMITS.contains(&reason.as_str()));
    if let Some((median, max)) = device.sm_clock_mhz_median.zip(device.sm_clock_mhz_max)
        && median < CLOCK_SHARE * max
        && device.n_samples >= LEAST_SAMPLES
        && !is_limited
        && faults.is_empty()
    {
        let text = format!("the device ran at {median:.0} of {max:.0} MHz and named no limit");
        found.push(Reason { text, severity: CLOCK_SHARE * max / median.max(1.0) });
    }
    // Where the driver does not say what they do, they may do anything.
    let n = device.n_other_processes.unwrap_or(0);
    if n > 0 && device.others_utilization.is_none_or(|share| share >= UTILIZATION) {
        let held = device.other_processes_bytes.map(|bytes| format!(" and held {}", crate::units::format_bytes(bytes)));
        let used = device.others_utilization.map(|share| format!(", {:.0} % of its time", share * 100.0));
        let text =
            format!("{n} other process(es) used the device{}{}", used.unwrap_or_default(), held.unwrap_or_default());
        found.push(Reason { text, severity: device.others_utilization.map_or(1.0, |share| share / UTILIZATION) });
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host() -> HostFigures {
        HostFigures {
            window_s: 1.0,
            n_cpus: 2,
            others_cpu_share: Some(0.01),
            steal_share: Some(0.0),
            waiting_share: Some(0.01),
            ..HostFigures::default()
        }
    }

    fn device() -> DeviceUse {
        DeviceUse {
            sm_clock_mhz_median: Some(1980.0),
            sm_clock_mhz_max: Some(1980.0),
            n_samples: 20,
            n_other_processes: Some(0),
            ..DeviceUse::default()
        }
    }

    fn of_host(host: &HostFigures) -> Option<String> {
        disturbance(Some(host), None, true).map(|reason| reason.text)
    }

    fn of_device(device: &DeviceUse) -> Option<String> {
        disturbance(None, Some(device), false).map(|reason| reason.text)
    }

    #[test]
    fn a_quiet_machine_and_an_unknown_one_give_no_reason() {
        assert_eq!(disturbance(Some(&host()), Some(&device()), true), None);
        assert_eq!(disturbance(Some(&HostFigures::default()), Some(&DeviceUse::default()), true), None);
        assert_eq!(disturbance(None, None, true), None);
    }

    #[test]
    fn others_on_the_processors_are_named_with_what_they_took() {
        let busy = HostFigures { others_cpu_share: Some(0.48), waiting_share: Some(0.6), ..host() };
        assert_eq!(of_host(&busy).as_deref(), Some("others took 0.96 of 2 CPUs; it waited for a CPU 60 % of the time"));
        let severity = disturbance(Some(&busy), None, true).expect("a reason").severity;
        assert!((severity - 12.0).abs() < 1e-9, "the worse of 9.6 and 12 times: {severity}");
        // On a device the host only matters where it keeps the process waiting.
        let beside = HostFigures { waiting_share: Some(0.0), ..busy };
        assert_eq!(disturbance(Some(&beside), None, false), None);
    }

    #[test]
    fn threads_wait_for_others_no_longer_than_those_ran() {
        let own = HostFigures { waiting_share: Some(0.48), others_cpu_share: Some(0.02), ..host() };
        assert_eq!(of_host(&own), None, "others ran for 4 % of the time");
        let others = HostFigures { others_cpu_share: Some(0.04), ..own.clone() };
        assert_eq!(of_host(&others).as_deref(), Some("it waited for a CPU 8 % of the time"));
        let unknown = HostFigures { others_cpu_share: None, ..own.clone() };
        assert_eq!(of_host(&unknown).as_deref(), Some("it waited for a CPU 48 % of the time"));
        let stolen = HostFigures { steal_share: Some(0.08), ..own };
        let told = of_host(&stolen).expect("a reason");
        assert!(told.ends_with("the hypervisor took 8 % of the CPUs"), "{told}");
    }

    #[test]
    fn a_window_that_the_clock_does_not_resolve_gives_no_reason() {
        let short = HostFigures { window_s: 0.02, others_cpu_share: Some(0.5), ..host() };
        assert_eq!(of_host(&short), None, "20 ms of processor time are two ticks");
        assert!(of_host(&HostFigures { window_s: 0.2, ..short }).is_some());
    }

    #[test]
    fn steal_and_heat_are_reasons() {
        let stolen = HostFigures { steal_share: Some(0.08), ..host() };
        assert_eq!(of_host(&stolen).as_deref(), Some("the hypervisor took 8 % of the CPUs"));
        let hot = HostFigures { n_thermal_events: Some(3), ..host() };
        assert_eq!(of_host(&hot).as_deref(), Some("the CPU was slowed down by heat (3 events)"));
    }

    #[test]
    fn a_device_is_disturbed_by_faults_and_lost_clocks_and_not_by_its_own_limits() {
        let with = |reasons: &[&str], median: f64| DeviceUse {
            throttle_reasons: reasons.iter().map(|reason| (*reason).to_owned()).collect(),
            sm_clock_mhz_median: Some(median),
            ..device()
        };
        assert_eq!(of_device(&with(&["sw_power_cap"], 1400.0)), None);
        let hot = of_device(&with(&["hw_thermal_slowdown", "sw_power_cap"], 1400.0));
        assert_eq!(hot.as_deref(), Some("the device was throttled (hw_thermal_slowdown)"));
        let slow = of_device(&with(&[], 1400.0));
        assert_eq!(slow.as_deref(), Some("the device ran at 1400 of 1980 MHz and named no limit"));
        assert_eq!(of_device(&DeviceUse { n_samples: 4, ..with(&[], 1400.0) }), None, "ends of regions alone");
    }

    #[test]
    fn other_processes_on_a_device_count_unless_they_are_known_to_idle() {
        let others = DeviceUse { n_other_processes: Some(2), other_processes_bytes: Some(3 << 20), ..device() };
        assert_eq!(of_device(&others).as_deref(), Some("2 other process(es) used the device and held 3.00 MiB"));
        let working = DeviceUse { others_utilization: Some(0.4), ..others.clone() };
        assert_eq!(
            of_device(&working).as_deref(),
            Some("2 other process(es) used the device, 40 % of its time and held 3.00 MiB")
        );
        assert_eq!(of_device(&DeviceUse { others_utilization: Some(0.0), ..others }), None);
        assert_eq!(of_device(&DeviceUse { n_labpipe_processes: Some(1), ..device() }), None, "labpipe's own");
    }
}
