// Command etcd is etcd as its own module builds it. `go install go.etcd.io/etcd/server/v3@...`
// refuses to, as that module has replace directives.
package main

import (
	"os"

	"go.etcd.io/etcd/server/v3/etcdmain"
)

func main() {
	etcdmain.Main(os.Args)
}
