//! Plans for people: rows, DOT and Mermaid.

use super::types::{Plan, Reason};
use petgraph::visit::EdgeRef;
use std::fmt::Write;

/// Longest value shown of a field that changed.
const VALUE_WIDTH: usize = 60;

impl Reason {
    /// Returns the reason in a few words.
    pub fn explain(&self) -> String {
        match self {
            Reason::Cached => "cached".to_owned(),
            Reason::New => "never computed before".to_owned(),
            Reason::Changed(changes) => {
                let parts: Vec<String> =
                    changes.iter().map(|(field, before, now)| change(field, before, now)).collect();
                parts.join("; ")
            }
            Reason::Missing => "its artifact is gone or damaged".to_owned(),
            Reason::Forced => "asked for".to_owned(),
            Reason::Remeasure => "to be measured again".to_owned(),
            Reason::Awaits(input) => format!("depends on what {input} gives"),
            Reason::InputRuns(input) => format!("{input} runs"),
            Reason::NotSelected => "not selected".to_owned(),
        }
    }
}

/// Says how one field changed; hashes are not shown, they tell a reader nothing.
fn change(field: &str, before: &str, now: &str) -> String {
    if let Some(input) = field.strip_prefix("inputs.") {
        // What gathers names its inputs; others have one, which the parameter's name stands for.
        return match (now.split_once(' '), before.split_once(' ')) {
            (Some((address, _)), _) | (None, Some((address, _))) => format!("input {address} changed"),
            (None, None) => format!("input {} changed", input.trim_end_matches("[0]")),
        };
    }
    match (field.strip_prefix("files."), before, now) {
        (Some(file), "absent", _) => format!("{file} is new"),
        (Some(file), _, "absent") => format!("{file} is no longer used"),
        (Some(file), ..) => format!("{file} changed"),
        (None, ..) => format!("{field}: {} -> {}", cut(before), cut(now)),
    }
}

fn cut(value: &str) -> String {
    if value.chars().count() <= VALUE_WIDTH {
        return value.to_owned();
    }
    let head: String = value.chars().take(VALUE_WIDTH).collect();
    format!("{head}…")
}

impl Plan {
    /// Returns a row per stage in execution order: (address, kind, `run`, `cached` or `skip`, reason, short key).
    pub fn rows(&self) -> Vec<[String; 5]> {
        let row = |node: &super::types::PlanNode| {
            let action = match (node.selected, node.runs) {
                (_, false) => "cached",
                (true, true) => "run",
                (false, true) => "skip",
            };
            let key = node.key.as_ref().map_or("not known yet".to_owned(), |key| key.short().to_owned());
            [node.stage.address.clone(), node.stage.kind.clone(), action.to_owned(), node.reason.explain(), key]
        };
        self.order.iter().map(|node| row(&self.graph[*node])).collect()
    }

    /// Returns the graph in Graphviz's language.
    pub fn to_dot(&self) -> String {
        let mut out =
            format!("digraph \"{}\" {{\n  rankdir=LR;\n  node [shape=box, fontname=\"sans-serif\"];\n", self.pipeline);
        for node in self.graph.node_weights() {
            let _ =
                writeln!(out, "  \"{}\" [label=\"{}\\n{}\"];", node.stage.address, node.stage.address, node.stage.kind);
        }
        for edge in self.graph.edge_references() {
            let (from, to) = (&self.graph[edge.source()].stage.address, &self.graph[edge.target()].stage.address);
            let style = if edge.weight().data { "" } else { ", style=dashed" };
            let _ = writeln!(out, "  \"{from}\" -> \"{to}\" [label=\"{}\"{style}];", edge.weight().param);
        }
        out.push_str("}\n");
        out
    }

    /// Returns the graph as a Mermaid flowchart.
    pub fn to_mermaid(&self) -> String {
        let mut out = "flowchart LR\n".to_owned();
        for node in self.graph.node_indices() {
            let stage = &self.graph[node].stage;
            let _ = writeln!(out, "  s{}[\"{}<br/>{}\"]", node.index(), stage.address, stage.kind);
        }
        for edge in self.graph.edge_references() {
            let arrow = if edge.weight().data { "-->" } else { "-.->" };
            let _ = writeln!(
                out,
                "  s{} {arrow}|{}| s{}",
                edge.source().index(),
                edge.weight().param,
                edge.target().index()
            );
        }
        out
    }
}
