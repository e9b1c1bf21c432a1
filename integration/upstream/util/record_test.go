//go:build upstream

// Our part of upstream's package: it writes down at which addresses node ports are served. The rest
// of the package comes from upstream's module, by way of an overlay.
package util

import (
	"fmt"
	"net"
	"testing"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/sets"
	"portcullis.dev/integration/upstream/record"
)

// A selection is which of a node's addresses of a family some CIDRs select.
type selection struct {
	Test      string      `json:"test"`
	Line      string      `json:"line"`
	CIDRs     []string    `json:"cidrs"`
	Addresses []string    `json:"addresses"`
	Family    v1.IPFamily `json:"ipFamily"`
	Selected  []string    `json:"selected"`
	// Whether any address of the family would be selected.
	All bool `json:"all"`
}

func recordSelection(
	t *testing.T, line int, cidrs []string, interfaces []InterfaceAddrsPair, family v1.IPFamily,
	selected sets.Set[string], all bool,
) {
	one := selection{
		Test:      record.Test(t),
		Line:      fmt.Sprintf("nodeport_addresses_test.go:%d", line),
		CIDRs:     cidrs,
		Addresses: []string{},
		Family:    family,
		Selected:  sets.List(selected),
		All:       all,
	}
	for _, pair := range interfaces {
		for _, address := range pair.addrs {
			one.Addresses = append(one.Addresses, address.(*net.IPNet).IP.String())
		}
	}
	record.Write(t, one)
}

// nextLine is what stands in upstream's tests for the line of a case, where cases run in order.
func nextLine(t *testing.T, lines []int) int {
	return record.Next(t, lines)
}
