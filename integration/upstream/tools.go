//go:build tools

// This file names what upstream's packages and their tests import, so that go.mod and go.sum cover
// it although upstream's files are not here.
//
// To move to another Kubernetes release vX.Y.Z, change k8s.io/kubernetes to vX.Y.Z and every
// replaced staging module to v0.Y.Z in go.mod, run `go mod tidy`, and then extract.sh.
package main

import (
	_ "github.com/google/go-cmp/cmp"
	_ "github.com/lithammer/dedent"
	_ "github.com/stretchr/testify/assert"
	_ "github.com/stretchr/testify/require"
	_ "golang.org/x/time/rate"
	_ "k8s.io/apiserver/pkg/util/feature"
	_ "k8s.io/client-go/kubernetes/fake"
	_ "k8s.io/component-base/featuregate/testing"
	_ "k8s.io/component-base/metrics/testutil"
	_ "k8s.io/klog/v2"
	_ "k8s.io/kubernetes/pkg/proxy/nftables"
	_ "k8s.io/kubernetes/pkg/proxy/util/testing"
	_ "k8s.io/kubernetes/test/utils/ktesting"
	_ "k8s.io/utils/ptr"
	_ "sigs.k8s.io/knftables"
)
