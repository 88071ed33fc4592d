//! The graph of the file's stages: cycles, and an order in which inputs come first. Nothing here recurses: a chain of 100,000
//! stages is legal.

/// Most cycles that are reported.
const MAX_CYCLES: usize = 8;

/// Stages by index, inputs before their consumers; and the cycles that were found, each from a stage back to itself.
#[derive(Debug, Default, PartialEq)]
pub struct Order {
    pub inputs_first: Vec<usize>,
    pub cycles: Vec<Vec<usize>>,
}

#[derive(Clone, Copy, PartialEq)]
enum State {
    New,
    OnPath,
    Done,
}

/// Orders stages; `targets` has the stages that each names.
pub fn order(targets: &[Vec<usize>]) -> Order {
    let mut state = vec![State::New; targets.len()];
    let mut order = Order::default();
    for start in 0..targets.len() {
        if state[start] != State::New {
            continue;
        }
        // The stages on the path, each with how many of its targets were looked at.
        let mut path: Vec<(usize, usize)> = vec![(start, 0)];
        state[start] = State::OnPath;
        while let Some((stage, next)) = path.last_mut() {
            let Some(&target) = targets[*stage].get(*next) else {
                state[*stage] = State::Done;
                order.inputs_first.push(*stage);
                path.pop();
                continue;
            };
            *next += 1;
            match state[target] {
                State::New => {
                    state[target] = State::OnPath;
                    path.push((target, 0));
                }
                State::OnPath if order.cycles.len() < MAX_CYCLES => {
                    let first = path.iter().position(|(stage, _)| *stage == target).unwrap_or(0);
                    // The path runs from consumer to input; shown the other way round it reads as data flows.
                    let mut cycle: Vec<usize> = path[first..].iter().map(|(stage, _)| *stage).chain([target]).collect();
                    cycle.reverse();
                    order.cycles.push(cycle);
                }
                State::OnPath | State::Done => {}
            }
        }
    }
    order
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn cycles_are_found_and_long_chains_are_none() {
        assert_eq!(order(&[vec![1], vec![2], vec![0], vec![3]]).cycles, [vec![0, 2, 1, 0], vec![3, 3]]);
        let chain: Vec<Vec<usize>> = (0..200_000).map(|i| if i == 199_999 { vec![] } else { vec![i + 1] }).collect();
        let found = order(&chain);
        assert!(found.cycles.is_empty() && found.inputs_first.len() == 200_000 && found.inputs_first[0] == 199_999);
    }

    proptest! {
        #[test]
        fn inputs_come_first_in_any_graph_without_cycles(edges in proptest::collection::vec((0usize..40, 0usize..40), 0..120)) {
            let mut targets = vec![Vec::new(); 40];
            for (a, b) in edges {
                if a != b {
                    targets[a.max(b)].push(a.min(b));
                }
            }
            let found = order(&targets);
            prop_assert!(found.cycles.is_empty());
            let place: Vec<usize> = (0..40).map(|i| found.inputs_first.iter().position(|j| *j == i).expect("every stage")).collect();
            for (stage, inputs) in targets.iter().enumerate() {
                prop_assert!(inputs.iter().all(|input| place[*input] < place[stage]));
            }
        }
    }
}
