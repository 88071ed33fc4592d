//! Files of Linux's `/proc`, read.

use std::collections::BTreeMap;
use std::path::Path;

/// Unit of times in `/proc/stat` (proc_stat(5): USER_HZ, which is 100 on every architecture that labpipe is built for).
const TICKS_PER_S: f64 = 100.0;

/// What a processor did since the machine started.
pub struct CpuTime {
    /// Idle, or waiting for a disk.
    pub idle_s: f64,
    pub steal_s: f64,
}

/// Reads the lines `cpuN` of `/proc/stat`, by N.
pub fn cpu_times(stat: &str) -> BTreeMap<usize, CpuTime> {
    let line = |line: &str| {
        let mut words = line.strip_prefix("cpu")?.split_whitespace();
        let cpu = words.next()?.parse().ok()?;
        let ticks: Vec<f64> = words.filter_map(|word| word.parse().ok()).collect();
        let at = |idx: usize| ticks.get(idx).copied().unwrap_or(0.0);
        let time = CpuTime { idle_s: (at(3) + at(4)) / TICKS_PER_S, steal_s: at(7) / TICKS_PER_S };
        (ticks.len() >= 4).then_some((cpu, time))
    };
    // The line of all processors begins with `cpu `: the word after it is a time.
    stat.lines().filter(|text| !text.starts_with("cpu ")).filter_map(line).collect()
}

/// Reads a list such as `0-3,8`.
pub fn cpu_list(text: &str) -> Vec<usize> {
    let range = |part: &str| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        Some(first.trim().parse::<usize>().ok()?..=last.trim().parse::<usize>().ok()?)
    };
    text.split(',').filter_map(range).flatten().collect()
}

/// Returns what follows a name at the beginning of a line.
pub fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines().find_map(|line| line.strip_prefix(name)).map(str::trim)
}

/// Reads user and system time of `/proc/PID/stat`. The program's name stands in brackets and may hold anything.
pub fn process_s(stat: &str) -> Option<f64> {
    let after_name = stat.rsplit_once(')')?.1;
    let mut words = after_name.split_whitespace().skip(11);
    let mut ticks = || words.next()?.parse::<f64>().ok();
    Some((ticks()? + ticks()?) / TICKS_PER_S)
}

/// Reads how long a thread ran and how long it waited to: nanoseconds, in this order.
pub fn schedstat_s(text: &str) -> Option<(f64, f64)> {
    let mut words = text.split_whitespace().map(|word| word.parse::<f64>().ok().map(|ns| ns / 1e9));
    Some((words.next()??, words.next()??))
}

/// Reads the total of the line `some`: microseconds.
pub fn pressure_s(text: &str) -> Option<f64> {
    let total = field(text, "some ")?.split_whitespace().find_map(|word| word.strip_prefix("total="))?;
    total.parse::<f64>().ok().map(|us| us / 1e6)
}

/// Returns labpipe's other processes: this one's parent and the parent's other children, those of them that run this same program.
#[cfg(feature = "cuda")]
pub fn relatives() -> Vec<u32> {
    relatives_in(Path::new("/proc"))
}

/// Returns them as a folder that is laid out like `/proc` has them.
pub fn relatives_in(proc: &Path) -> Vec<u32> {
    let exe = |pid: &str| std::fs::read_link(proc.join(pid).join("exe")).ok();
    let number = |status: &str, name: &str| field(status, name).and_then(|pid| pid.parse::<u32>().ok());
    let status = std::fs::read_to_string(proc.join("self/status")).unwrap_or_default();
    let (Some(own), Some(parent)) = (number(&status, "Pid:"), number(&status, "PPid:")) else { return Vec::new() };
    let mut found = vec![parent];
    let tasks = std::fs::read_dir(proc.join(format!("{parent}/task"))).into_iter().flatten().flatten();
    for task in tasks {
        let children = std::fs::read_to_string(task.path().join("children")).unwrap_or_default();
        found.extend(children.split_whitespace().filter_map(|pid| pid.parse::<u32>().ok()));
    }
    let program = exe("self");
    found.retain(|pid| *pid != own && program.is_some() && exe(&pid.to_string()) == program);
    found
}
