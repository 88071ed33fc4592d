//! Who uses the host's processors while something is timed, as Linux tells it in `/proc` and `/sys`.
//!
//! Files are read at the ends of timed regions alone: nothing samples on the processors that compute.

use super::host_sums::{Snapshot, Sums};
use super::proc_files::{CpuTime, cpu_list, cpu_times, field, pressure_s, process_s, relatives_in, schedstat_s};
use super::processor_speed::processor_speed;
use crate::artifact::HostFigures;
use crate::inference::{HostProbe, QUIET_CPUS, Threads};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Clocks of more processors are not read: on some machines each reading interrupts the processor.
const MAX_CLOCKS: usize = 16;
const QUIET_PERIOD: Duration = Duration::from_millis(200);
const QUIET_TRIES: usize = 10;

/// Reads `/proc` at the ends of timed regions.
pub struct ProcProbe {
    proc: PathBuf,
    sys: PathBuf,
    /// Processors that the process may use.
    cpus: Vec<usize>,
    /// labpipe's parent process and its other workers.
    relatives: Vec<u32>,
    begun: Option<(Instant, Snapshot)>,
    sums: Sums,
    /// A wait ended without quiet: the next ones look once.
    gave_up: bool,
}

impl ProcProbe {
    /// Returns a probe; `None` where the system has no `/proc/stat`.
    pub fn start() -> Option<ProcProbe> {
        ProcProbe::at(Path::new("/proc"), Path::new("/sys"))
    }

    fn at(proc: &Path, sys: &Path) -> Option<ProcProbe> {
        let status = std::fs::read_to_string(proc.join("self/status")).ok()?;
        let allowed = field(&status, "Cpus_allowed_list:").map(cpu_list).unwrap_or_default();
        let stat = std::fs::read_to_string(proc.join("stat")).ok()?;
        let cpus: Vec<usize> = cpu_times(&stat).into_keys().filter(|cpu| allowed.contains(cpu)).collect();
        let (proc, sys) = (proc.to_owned(), sys.to_owned());
        let probe =
            ProcProbe { proc, sys, cpus, relatives: Vec::new(), begun: None, sums: Sums::default(), gave_up: false };
        (!probe.cpus.is_empty()).then_some(probe)
    }

    fn read(&self, path: &str) -> Option<String> {
        std::fs::read_to_string(self.proc.join(path)).ok()
    }

    fn snapshot(&self) -> Snapshot {
        let (stat, at) = (self.read("stat"), Instant::now());
        let times = stat.as_deref().map(cpu_times);
        let sum = |of: fn(&CpuTime) -> f64| {
            let times = times.as_ref()?;
            Some(self.cpus.iter().filter_map(|cpu| times.get(cpu)).map(of).sum::<f64>())
        };
        let relatives = self.relatives.iter().filter_map(|pid| self.read(&format!("{pid}/stat")));
        let mut snapshot = Snapshot {
            at: Some(at),
            idle_s: sum(|time| time.idle_s),
            steal_s: sum(|time| time.steal_s),
            relatives_s: relatives.filter_map(|stat| process_s(&stat)).sum(),
            pressure_s: self.read("pressure/cpu").as_deref().and_then(pressure_s),
            n_thermal: self.thermal_events(),
            ..Snapshot::default()
        };
        for task in std::fs::read_dir(self.proc.join("self/task")).into_iter().flatten().flatten() {
            let Some(thread) = task.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
            let of = |name: &str| std::fs::read_to_string(task.path().join(name)).ok();
            if let Some(times) = of("schedstat").as_deref().and_then(schedstat_s) {
                snapshot.threads.insert(thread, times);
            }
            let status = of("status");
            let switches = status.as_deref().and_then(|status| field(status, "nonvoluntary_ctxt_switches:"));
            if let Some(n) = switches.and_then(|n| n.parse::<u64>().ok()) {
                snapshot.involuntary = Some(snapshot.involuntary.unwrap_or(0) + n);
            }
        }
        snapshot
    }

    fn thermal_events(&self) -> Option<u64> {
        let of = |cpu: &usize, name: &str| self.sys_number(&format!("cpu{cpu}/thermal_throttle/{name}"));
        let package = self.cpus.first().and_then(|cpu| of(cpu, "package_throttle_count"));
        let cores: Vec<u64> = self.cpus.iter().filter_map(|cpu| of(cpu, "core_throttle_count")).collect();
        (package.is_some() || !cores.is_empty()).then(|| package.unwrap_or(0) + cores.iter().sum::<u64>())
    }

    fn clocks_mhz(&self) -> impl Iterator<Item = f64> + '_ {
        let khz = |cpu: &usize| self.sys_number(&format!("cpu{cpu}/cpufreq/scaling_cur_freq"));
        self.cpus.iter().take(MAX_CLOCKS).filter_map(khz).map(|khz| khz as f64 / 1e3)
    }

    fn sys_number(&self, path: &str) -> Option<u64> {
        let path = self.sys.join("devices/system/cpu").join(path);
        std::fs::read_to_string(path).ok()?.trim().parse().ok()
    }
}

impl HostProbe for ProcProbe {
    fn begin(&mut self) {
        if self.begun.is_none() {
            if self.sums.window_s == 0.0 {
                self.relatives = relatives_in(&self.proc);
            }
            let before = self.snapshot();
            self.begun = Some((Instant::now(), before));
        }
    }

    fn end(&mut self) {
        let Some((start, before)) = self.begun.take() else { return };
        let window_s = start.elapsed().as_secs_f64();
        let after = self.snapshot();
        let clocks: Vec<f64> = self.clocks_mhz().collect();
        self.sums.clocks_mhz.extend(clocks);
        self.sums.add(window_s, self.cpus.len(), &before, &after);
    }

    fn take(&mut self) -> HostFigures {
        self.end();
        let sums = std::mem::take(&mut self.sums);
        let load = self.read("loadavg").and_then(|text| text.split(' ').next()?.parse().ok());
        sums.figures(self.cpus.len(), load)
    }

    fn wait_until_quiet(&mut self, keep_waiting: &dyn Fn() -> bool) {
        let n_tries = if self.gave_up { 1 } else { QUIET_TRIES };
        for _ in 0..n_tries {
            if !keep_waiting() {
                return;
            }
            let (start, before) = (Instant::now(), self.snapshot());
            std::thread::sleep(QUIET_PERIOD);
            let mut sums = Sums::default();
            sums.add(start.elapsed().as_secs_f64(), self.cpus.len(), &before, &self.snapshot());
            let others = sums.figures(self.cpus.len(), None).others_cpu_share;
            if others.is_none_or(|share| share * (self.cpus.len() as f64) < QUIET_CPUS) {
                self.gave_up = false;
                return;
            }
        }
        self.gave_up = true;
    }

    fn processor_speed(&mut self, threads: Threads) -> Option<f64> {
        Some(processor_speed(threads))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A machine of three processors, of which the process may use two, written into a folder.
    struct Machine(tempfile::TempDir);

    impl Machine {
        fn new() -> Machine {
            let machine = Machine(tempfile::tempdir().expect("a folder"));
            for (path, text) in [
                ("proc/self/status", "Name:\tlabpipe\nPid:\t40\nPPid:\t30\nCpus_allowed_list:\t0-1\n"),
                ("proc/30/task/30/children", "40 "),
                ("proc/30/task/31/children", "50 60 "),
                ("proc/loadavg", "1.25 0.50 0.10 1/100 40\n"),
            ] {
                machine.write(path, text);
            }
            for (pid, program) in
                [("self", "labpipe"), ("30", "labpipe"), ("40", "labpipe"), ("50", "labpipe"), ("60", "sh")]
            {
                let folder = machine.0.path().join("proc").join(pid);
                std::fs::create_dir_all(&folder).expect("a folder");
                std::os::unix::fs::symlink(program, folder.join("exe")).expect("a link");
            }
            machine
        }

        fn write(&self, path: &str, text: &str) {
            let path = self.0.path().join(path);
            std::fs::create_dir_all(path.parent().expect("a parent")).expect("folders");
            std::fs::write(path, text).expect("written");
        }

        /// Writes counters: ticks of idle and stolen time per processor, seconds that two threads ran and waited, switches.
        fn counters(&self, idle: [u64; 3], stolen: u64, threads: [(f64, f64); 2], switches: u64) {
            let line = |cpu: usize| format!("cpu{cpu} 5 6 7 {} 100 7 7 {stolen} 0 0\n", idle[cpu]);
            let lines: String = (0..3).map(line).collect();
            self.write("proc/stat", &format!("cpu  9 9 9 9 9 9 9 9 9 9\n{lines}intr 5\n"));
            for (idx, (ran, waited)) in threads.into_iter().enumerate() {
                let folder = format!("proc/self/task/{}", 40 + idx);
                self.write(&format!("{folder}/schedstat"), &format!("{} {} 3\n", ran * 1e9, waited * 1e9));
                self.write(&format!("{folder}/status"), &format!("nonvoluntary_ctxt_switches:\t{switches}\n"));
            }
        }

        fn relatives(&self, ticks: [u64; 2]) {
            for (pid, ticks) in [30, 50].into_iter().zip(ticks) {
                let name = if pid == 30 { "(lab) pipe)" } else { "(labpipe)" };
                self.write(
                    &format!("proc/{pid}/stat"),
                    &format!("{pid} {name} S 1 2 3 4 5 6 7 8 9 10 {ticks} 10 0 0\n"),
                );
            }
        }

        fn probe(&self) -> ProcProbe {
            ProcProbe::at(&self.0.path().join("proc"), &self.0.path().join("sys")).expect("a probe")
        }
    }

    fn near(found: Option<f64>, wanted: f64) -> bool {
        found.is_some_and(|found| (found - wanted).abs() < 1e-9)
    }

    #[test]
    fn time_of_others_is_what_is_left_of_the_allowed_processors() {
        let machine = Machine::new();
        machine.counters([1000, 1000, 1000], 0, [(5.0, 0.0), (5.0, 0.0)], 10);
        machine.relatives([100, 100]);
        machine.write(
            "proc/pressure/cpu",
            "some avg10=1.00 avg60=1.00 avg300=1.00 total=1000000\nfull avg10=0.00 total=9\n",
        );
        machine.write("sys/devices/system/cpu/cpu1/cpufreq/scaling_cur_freq", "2400000\n");
        let mut probe = machine.probe();
        assert_eq!(probe.cpus, [0, 1]);
        probe.begin();
        assert_eq!(probe.relatives, [30, 50], "a child that is another program is none of labpipe's");
        // Of two seconds 0.2 were idle and 0.2 stolen; 0.9 and 0.4 s were the process's, 0.2 s those of labpipe's other processes.
        machine.counters([1010, 1010, 9000], 10, [(5.9, 0.05), (5.4, 0.4)], 15);
        machine.relatives([115, 105]);
        machine.write("proc/pressure/cpu", "some avg10=1.00 avg60=1.00 avg300=1.00 total=1250000\n");
        let (start, before) = probe.begun.take().expect("begun");
        let after = Snapshot { at: before.at.map(|at| at + Duration::from_secs(1)), ..probe.snapshot() };
        probe.begun = Some((start, before.clone()));
        probe.end();
        let clocks_mhz = std::mem::take(&mut probe.sums.clocks_mhz);
        let mut sums = Sums { clocks_mhz, ..Sums::default() };
        sums.add(1.0, 2, &before, &after);
        let figures = sums.figures(2, Some(1.25));
        assert!(near(figures.others_cpu_share, 0.05), "{figures:?}");
        assert!(near(figures.labpipe_cpu_share, 0.1) && near(figures.steal_share, 0.1), "{figures:?}");
        assert!(near(figures.waiting_share, 0.4) && near(figures.cpu_pressure_share, 0.25), "{figures:?}");
        assert!(near(figures.involuntary_switches_per_s, 10.0), "two threads: {figures:?}");
        assert_eq!((figures.cpu_mhz_min, figures.cpu_mhz_median), (Some(2400.0), Some(2400.0)));
        assert_eq!((figures.n_thermal_events, figures.n_cpus), (None, 2));
    }

    #[test]
    fn regions_add_up_and_what_is_between_them_does_not_count() {
        let machine = Machine::new();
        machine.counters([0, 0, 0], 0, [(0.0, 0.0), (0.0, 0.0)], 0);
        let mut probe = machine.probe();
        for (before, gained) in [(10, 1), (40, 2)] {
            let count = "sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count";
            machine.write(count, &format!("{before}\n"));
            machine.counters([0, 0, 0], 0, [(0.0, 0.0), (0.0, 0.0)], before);
            probe.begin();
            probe.begin();
            machine.write(count, &format!("{}\n", before + 2));
            machine.counters([0, 0, 0], 0, [(0.0, 0.0), (0.0, 0.0)], before + gained);
            probe.end();
            probe.end();
        }
        let window_s = probe.sums.window_s;
        let figures = probe.take();
        assert!(near(figures.involuntary_switches_per_s, 6.0 / window_s), "two threads, 1 and 2 switches: {figures:?}");
        assert_eq!((figures.load_average, figures.n_thermal_events), (Some(1.25), Some(4)));
        assert_eq!(probe.take().window_s, 0.0, "a case begins anew");
    }

    #[test]
    fn what_a_system_does_not_have_is_null() {
        let machine = Machine::new();
        assert!(ProcProbe::at(&machine.0.path().join("proc"), Path::new("/nowhere")).is_none(), "no /proc/stat");
        machine.write("proc/stat", "cpu0 1 2 3 4\ncpu1 1 2 3 4\n");
        let mut probe = machine.probe();
        probe.begin();
        let figures = probe.take();
        assert_eq!((figures.others_cpu_share, figures.waiting_share, figures.cpu_pressure_share), (None, None, None));
        assert_eq!((figures.cpu_mhz_median, figures.involuntary_switches_per_s), (None, None));
        assert!(near(figures.steal_share, 0.0), "{figures:?}");
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn this_machine_is_read() {
        let mut probe = ProcProbe::start().expect("Linux");
        probe.begin();
        let start = Instant::now();
        while start.elapsed() < Duration::from_millis(50) {
            std::hint::spin_loop();
        }
        let figures = probe.take();
        assert!(figures.window_s >= 0.05 && figures.n_cpus >= 1 && figures.load_average.is_some(), "{figures:?}");
    }
}
