//! Many who commit at the same time.

use std::sync::{Arc, Mutex};

use anyhow::{Result, ensure};
use portcullis::commit::{Change, Committer, Worker};
use portcullis_integration::services::Sketch;

use super::{Machine, NODE_PORTS_AT, fresh, node, too_long, web};

#[test]
fn many_who_wait_share_a_transaction() -> Result<()> {
    let Some(machine) = Machine::new()? else { return Ok(()) };
    let reports = Arc::new(Mutex::new(Vec::new()));
    let sink = Arc::clone(&reports);
    let worker = machine.namespace.enter(|| {
        Worker::open(move |report| sink.lock().expect("no panic while reporting").push(report))
    })?;
    let (committer, thread) = Committer::start(worker);
    let services: Vec<Sketch> = (0..200).map(|n| web(n, &[n % 7, n % 7 + 1])).collect();
    let guilty = too_long(1).allow("10.0.0.0/8");
    let before = machine.generation()?;
    let results = machine.namespace.block_on(async {
        let everybody = async {
            let change = |s: &Sketch| Change::Service(s.name(), Some(s.plan()));
            // Each change is queued when `commit` returns.
            let waiting: Vec<_> =
                services.iter().chain([&guilty]).map(|s| committer.commit(change(s))).collect();
            let mut results = Vec::new();
            for answer in waiting {
                results.push(answer.await);
            }
            results
        };
        // All of them come while the thread is busy with the first.
        let adoption = committer.adopt(node(NODE_PORTS_AT)?, vec![web(250, &[1]).plan().into()]);
        let (adoption, results) = tokio::join!(adoption, everybody);
        adoption?;
        anyhow::Ok(results)
    })?;
    let (last, others) = results.split_last().expect("an answer for each");
    ensure!(others.len() == services.len() && others.iter().all(Result::is_ok), "{results:?}");
    ensure!(last.is_err(), "the guilty was not told");
    let transactions = machine.generation()? - before;
    println!("{transactions} transactions for {} changes", results.len());
    ensure!(transactions <= 10, "{transactions} transactions for {} changes", results.len());
    let all = [&services[..], &[web(250, &[1])]].concat();
    machine.state()?.expect(&fresh(&all)?)?;

    // The thread ends with the last handle, and answers everything that was queued.
    let late = committer.commit(Change::Service(web(1, &[]).name(), None));
    drop(committer);
    machine.namespace.block_on(late)?;
    thread.join().expect("the thread does not panic");
    Ok(())
}
