//! Workers as processes: killed, orphaned, interrupted; and what they measure of their own memory.
#![cfg(feature = "cpu")]

mod support;

use std::fs;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use support::Lab;

/// Two models; the first one's perplexity takes many seconds on two cores.
const TWO_MODELS: &str = "
version: 1
name: two
stages:
  fp16: { kind: load, model: models/stories260k, dtype: f16 }
  nf4:  { kind: quantize, model: fp16, config: experiments/nf4.yaml }
  slow: { kind: ppl, model: fp16, text: experiments/data/tinystories.txt, max_length: 512, stride: 64 }
  fast: { kind: ppl, model: nf4, text: { source: experiments/data/tinystories.txt, n_chars: 6000 }, max_length: 256, stride: 128 }
";

fn start(lab: &Lab) -> Child {
    lab.write("two.yaml", TWO_MODELS);
    let mut command = lab.command(&["run", "two.yaml", "--log-format", "plain"]);
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("labpipe starts")
}

/// Returns the ids of a process's children; the system lists them by the thread that started each.
fn children(id: u32) -> Vec<u32> {
    let threads = fs::read_dir(format!("/proc/{id}/task")).into_iter().flatten().filter_map(Result::ok);
    let lists = threads.filter_map(|thread| fs::read_to_string(thread.path().join("children")).ok());
    lists.flat_map(|list| list.split_whitespace().filter_map(|id| id.parse().ok()).collect::<Vec<_>>()).collect()
}

fn is_alive(id: u32) -> bool {
    // A zombie has ended too.
    fs::read_to_string(format!("/proc/{id}/stat")).is_ok_and(|stat| !stat.contains(") Z "))
}

/// Waits for a condition for at most a minute.
#[track_caller]
fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !holds() {
        assert!(Instant::now() < deadline, "{what} within a minute");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Waits until the worker that holds a model runs its stage, and returns its id.
fn busy_worker(parent: &Child) -> u32 {
    let cpu_ticks = |id: u32| {
        let stat = fs::read_to_string(format!("/proc/{id}/stat")).unwrap_or_default();
        let fields: Vec<u64> = stat
            .rsplit(')')
            .next()
            .unwrap_or_default()
            .split_whitespace()
            .map(|field| field.parse().unwrap_or(0))
            .collect();
        fields.get(11).zip(fields.get(12)).map_or(0, |(user, system)| user + system)
    };
    let mut found = None;
    wait_until("a worker computes", || {
        // Half a second of processor time: more than loading and quantizing take.
        found = children(parent.id()).into_iter().find(|id| cpu_ticks(*id) > 50);
        found.is_some()
    });
    found.expect("just found")
}

fn signal(name: &str, id: u32) {
    let status = Command::new("kill").args([name, &id.to_string()]).status().expect("kill starts");
    assert!(status.success(), "kill {name} {id}");
}

#[test]
fn a_killed_worker_fails_its_stage_and_the_run_goes_on() {
    let lab = Lab::new();
    let child = start(&lab);
    signal("-KILL", busy_worker(&child));
    let output = child.wait_with_output().expect("an end");
    let err = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(3), "{err}");
    assert!(err.contains("its worker process was killed (signal 9)"), "{err}");
    assert!(lab.record("fast")["results"][0]["perplexity"].as_f64().is_some_and(|value| value > 1.0));
    let outcomes = lab.outcomes();
    for (stage, outcome) in [("slow", "failed"), ("fast", "done")] {
        assert!(outcomes.contains(&(stage.to_owned(), outcome.to_owned())), "{outcomes:?}");
    }
}

#[test]
fn a_worker_ends_when_its_parent_is_killed() {
    let lab = Lab::new();
    let mut child = start(&lab);
    let worker = busy_worker(&child);
    child.kill().expect("a signal");
    child.wait().expect("an end");
    wait_until("the worker ends", || !is_alive(worker));
}

#[test]
fn an_interrupt_of_the_whole_group_ends_workers_within_two_seconds() {
    let lab = Lab::new();
    let child = start(&lab);
    let worker = busy_worker(&child);
    // A terminal sends Ctrl-C to both.
    signal("-INT", worker);
    signal("-INT", child.id());
    let interrupted = Instant::now();
    let output = child.wait_with_output().expect("an end");
    let took = interrupted.elapsed();
    let err = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(130), "{err}");
    assert!(!is_alive(worker) && took < Duration::from_secs(2), "{took:?}: {err}");
    assert!(!err.contains("its worker process"), "{err}");
}

#[test]
fn a_model_s_peak_memory_does_not_depend_on_what_ran_before() {
    let stages = |with_base: bool| {
        let bench = "prefill-bench, n_prompt: [64, 256], samples: 3, warmup: 1, seed: 1 }";
        let base = if with_base {
            format!("  base: {{ kind: {bench}\n").replace("bench,", "bench, model: fp16,")
        } else {
            String::new()
        };
        format!(
            "version: 1\nname: memory\nstages:\n  fp16: {{ kind: load, model: models/stories260k, dtype: f16 }}\n  \
             nf4: {{ kind: quantize, model: fp16, config: experiments/nf4.yaml }}\n{base}  own: {{ kind: {}\n",
            bench.replace("bench,", "bench, model: nf4,")
        )
    };
    let peak = |with_base: bool| {
        let lab = Lab::new();
        lab.write("memory.yaml", &stages(with_base));
        lab.expect(0, &["run", "memory.yaml"]);
        lab.record("own")["process_peak_bytes"].as_f64().expect("a figure")
    };
    let (alone, after_another) = (peak(false), peak(true));
    let ratio = after_another / alone;
    assert!((0.8..1.25).contains(&ratio), "{alone} bytes alone, {after_another} after another model");
}
