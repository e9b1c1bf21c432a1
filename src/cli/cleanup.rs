//! `portcullis cleanup`

use anyhow::bail;
use portcullis::netlink::{Batch, Error, Socket};
use portcullis::ruleset::TABLE;

use super::kernel::explain;
use super::{Verdict, print};

/// Deletes the table with everything in it. Connections that are open through Service addresses end
/// with it, unless another table has chains of type nat: the kernel translates packets only while
/// there are any.
pub fn cleanup() -> anyhow::Result<Verdict> {
    let mut socket = Socket::open().map_err(explain)?;
    let listed = socket.at_one_moment(|socket| socket.list_table(TABLE, |_, _| true));
    if listed.map_err(explain)?.is_none() {
        print(&format!("table inet {TABLE}: not there, nothing to remove\n"))?;
        return Ok(Verdict::Fine);
    }
    let mut batch = Batch::new(TABLE);
    batch.delete_table();
    match socket.commit(batch) {
        Ok(()) => print(&format!("table inet {TABLE}: removed\n"))?,
        Err(Error::Refused(refusals))
            if refusals.iter().any(|r| r.error.raw_os_error() == Some(nix::libc::EPERM)) =>
        {
            bail!(
                "table inet {TABLE} belongs to a portcullis that is running, or this process is \
                 not root (CAP_NET_ADMIN): end the daemon first"
            );
        }
        Err(error) => return Err(explain(error)),
    }
    Ok(Verdict::Fine)
}
